-- What `verify` asks of one SAE, $sae. A statement with a title gives one row of text for each fault; a title
-- that ends in (documents), (rows) or (all rows) is for SAEs that keep those: `documents` or more, token rows
-- of at least a sample of documents, all token rows; in (pages), for indexes that have them. The rules are the contract's, written here once more:
-- nothing is taken from views but what they show.

CREATE OR REPLACE TEMP TABLE _merged AS
SELECT
    feature,
    sum(n_tokens)::BIGINT AS n_tokens,
    sum(n_contexts)::BIGINT AS n_contexts,
    sum(n_documents)::BIGINT AS n_documents,
    sum(sum_high) * 18446744073709551616::HUGEINT + sum(sum_low) AS total,
    sum(squares_high) * 18446744073709551616::HUGEINT + sum(squares_low) AS squares,
    _furthest(max(max), min(max)) AS max
FROM $features WHERE sae = $sae GROUP BY feature;

CREATE OR REPLACE TEMP TABLE _top AS SELECT * FROM _top_contexts WHERE sae = $sae;

CREATE OR REPLACE TEMP TABLE _drawn AS SELECT * FROM _sampled_contexts WHERE sae = $sae;

-- # saes: counts are those of documents and features
SELECT 'counted tokens: ' || coalesce(n, 0) || ', documents have ' || counted
FROM (SELECT sum(n_tokens)::BIGINT AS n FROM $saes WHERE sae = $sae),
    (SELECT coalesce(sum(tokens), 0)::BIGINT AS counted FROM _facts)
WHERE coalesce(n, 0) > counted OR (NOT $loud_left_out AND coalesce(n, 0) <> counted)
UNION ALL
SELECT 'activations: ' || coalesce(n, 0) || ', features have ' || active
FROM (SELECT sum(n_active)::BIGINT AS n FROM $saes WHERE sae = $sae),
    (SELECT coalesce(sum(n_tokens), 0)::BIGINT AS active FROM _merged)
WHERE coalesce(n, 0) <> active;

-- # saes: sums over the sample are possible
SELECT 'of unit ' || unit || ' on'
FROM $saes
WHERE sae = $sae AND (
    squares_high < 0 OR error_high < 0
    OR (sample_tokens = 0 AND (squares_high, squares_low, error_high, error_low) <> (0, 0, 0, 0))
);

-- # features: are active on no more than there is
SELECT 'feature ' || feature || ': ' || m.n_tokens || ' tokens, ' || n_contexts || ' contexts, ' || n_documents
    || ' documents'
FROM _merged AS m,
    (SELECT sum(n_tokens) AS n FROM $saes WHERE sae = $sae),
    (SELECT count(*) AS contexts, count(DISTINCT document) AS documents FROM _places)
WHERE m.n_tokens > n OR n_contexts > contexts OR n_documents > documents;

-- # top_contexts: begin with the features' maxima
SELECT 'feature ' || coalesce(m.feature, t.feature) || ': the first is ' || coalesce(activation::VARCHAR, 'none')
    || ', the maximum ' || coalesce(max::VARCHAR, 'none')
FROM _merged AS m FULL JOIN (SELECT * FROM _top WHERE rank = 1) AS t ON t.feature = m.feature
WHERE abs(t.activation) IS DISTINCT FROM abs(m.max);

-- # top_contexts: are at counted tokens
SELECT 'feature ' || feature || ', context ' || t.context || ', position ' || position
FROM $top_contexts AS t LEFT JOIN $contexts AS c ON c.context = t.context
WHERE t.sae = $sae AND NOT coalesce(c.counted[position + 1], false);

-- # top_contexts: are of different documents and endings
SELECT 'feature ' || feature || ': document ' || document || ' twice'
FROM _top JOIN _places USING (context) GROUP BY feature, document HAVING count(*) > 1
UNION ALL
SELECT 'feature ' || feature || ': contexts ' || list(context)::VARCHAR || ' end alike'
FROM (
    SELECT feature, t.context, c.tokens[greatest(position - 15, 0) + 1 : position + 1] AS ending
    FROM _top AS t JOIN $contexts AS c ON c.context = t.context
)
GROUP BY feature, ending HAVING count(*) > 1;

-- # top_contexts: have the hash of their ending
SELECT 'feature ' || feature || ', context ' || t.context
FROM $top_contexts AS t JOIN $contexts AS c ON c.context = t.context
WHERE t.sae = $sae AND t.ending <> _ending(c.tokens[greatest(position - 15, 0) + 1 : position + 1]);

-- # sampled_contexts: are at counted tokens
SELECT 'feature ' || feature || ', context ' || t.context || ', position ' || position
FROM (
    SELECT sae, feature, context, position FROM $sampled_contexts
    UNION ALL SELECT sae, feature, context, position FROM $sampled_merged
) AS t
LEFT JOIN $contexts AS c ON c.context = t.context
WHERE t.sae = $sae AND NOT coalesce(c.counted[position + 1], false);

-- # sampled_contexts: strata hold all contexts of a feature
SELECT 'feature ' || coalesce(m.feature, s.feature) || ': ' || coalesce(n, 0) || ' contexts in strata, '
    || coalesce(n_contexts, 0) || ' counted'
FROM _merged AS m
FULL JOIN (
    SELECT feature, sum(stratum_contexts) AS n
    FROM (SELECT DISTINCT feature, stratum, stratum_contexts FROM _drawn)
    GROUP BY feature
) AS s ON s.feature = m.feature
WHERE n IS DISTINCT FROM n_contexts
UNION ALL
SELECT 'feature ' || feature || ', stratum ' || stratum || ': ' || count(*) || ' of ' || any_value(stratum_contexts)
FROM _drawn GROUP BY feature, stratum HAVING count(*) <> least($sample_k, any_value(stratum_contexts));

-- # sampled_contexts: have their hash
SELECT 'feature ' || feature || ', context ' || s.context
FROM $sampled_merged AS s JOIN _places AS p ON p.context = s.context
WHERE s.sae = $sae AND s.hash <> _lot($seed::UBIGINT, feature, place_hash);

-- # windows: are at counted tokens
SELECT 'feature ' || feature || ', context ' || w.context || ', position ' || near
FROM (
    SELECT feature, context, position + unnest(offsets) AS near FROM $top_contexts WHERE sae = $sae
    UNION ALL SELECT feature, context, position + unnest(offsets) FROM $sampled_contexts WHERE sae = $sae
    UNION ALL SELECT feature, context, position + unnest(offsets) FROM $sampled_merged WHERE sae = $sae
) AS w
LEFT JOIN $contexts AS c ON c.context = w.context
WHERE near < 0 OR NOT coalesce(c.counted[near + 1], false);

-- # pages: have what the views show (pages)
WITH written AS (
    SELECT feature, rank, context, position, activation, offsets, values, document, first, tokens
    FROM $pages WHERE sae = $sae
), wanted AS (
    SELECT
        feature, rank, t.context, position, activation,
        list_transform(positions, lambda p: p - position)::TINYINT[] AS offsets, values, c.document,
        greatest(position - $near, 0)::INTEGER AS first,
        c.tokens[greatest(position - $near, 0) + 1 : position + $near + 1] AS tokens
    FROM top_contexts AS t JOIN $contexts AS c ON c.context = t.context
    WHERE t.sae = $sae
)
SELECT 'feature ' || feature || ', rank ' || rank
FROM (
    (FROM written EXCEPT ALL FROM wanted)
    UNION ALL (FROM wanted EXCEPT ALL FROM written)
);

-- # document_features: are of documents with that many tokens (documents)
SELECT 'feature ' || feature || ', document ' || f.document
FROM $document_features AS f LEFT JOIN $documents AS d ON d.document = f.document
WHERE f.sae = $sae AND f.n_tokens > coalesce(d.n_tokens, 0);

-- # document_features: add up to features (documents)
SELECT 'feature ' || coalesce(m.feature, f.feature) || ': ' || coalesce(f.n, 0) || ' documents with '
    || coalesce(f.n_tokens, 0) || ' tokens and a sum of ' || coalesce(f.total, 0) || ', features has '
    || coalesce(m.n_documents, 0) || ', ' || coalesce(m.n_tokens, 0) || ' and ' || coalesce(wanted, 0)
FROM (SELECT *, total::DOUBLE / pow(2, 64) AS wanted FROM _merged) AS m
FULL JOIN (
    SELECT
        feature, count(*) AS n, sum(n_tokens)::BIGINT AS n_tokens, _furthest(max(max), min(max)) AS max,
        fsum(sum) AS total, sum(abs(sum)) AS size
    FROM $document_features WHERE sae = $sae GROUP BY feature
) AS f ON f.feature = m.feature
WHERE (f.n, f.n_tokens, f.max) IS DISTINCT FROM (m.n_documents, m.n_tokens, m.max)
    OR abs(f.total - wanted) > 1e-13 * f.size;

-- # top_contexts: are the documents' maxima (documents)
SELECT 'feature ' || t.feature || ', context ' || t.context
FROM _top AS t
JOIN _places AS p ON p.context = t.context
LEFT JOIN (SELECT * FROM $document_features WHERE sae = $sae) AS f
    ON f.feature = t.feature AND f.document = p.document
WHERE f.max IS DISTINCT FROM t.activation;

-- # activations: are at counted tokens (rows)
SELECT 'feature ' || feature || ', context ' || token // $length || ', position ' || token % $length
FROM $activations AS a LEFT JOIN $contexts AS c ON c.context = a.token // $length
WHERE a.sae = $sae AND NOT coalesce(c.counted[a.token % $length + 1], false);

-- A context's highest activation: by absolute value, of equals the positive, then the first. Products with
-- less than 1 + 2^-9 keep the order of bfloat16 numbers, so that one maximum decides all three.
-- (rows)
CREATE OR REPLACE TEMP TABLE _best AS
SELECT
    feature, context, count(*) AS n, sum(trunc(value * pow(2, 64))::HUGEINT) AS total,
    sum(trunc(value * value * pow(2, 56))::HUGEINT) AS squares,
    arg_max(value, key)::FLOAT AS value, arg_max(position, key) AS position
FROM (
    SELECT *, abs(value) * (1 + ((value > 0)::INTEGER * 131072 + 131071 - position) / pow(2, 28)) AS key
    FROM (
        SELECT
            feature, token // $length AS context, (token % $length)::INTEGER AS position,
            activation::DOUBLE AS value
        FROM $activations WHERE sae = $sae
    )
)
GROUP BY feature, context;

-- What each document offers: the highest of its contexts, of equals the positive, then the first.
-- (rows)
CREATE OR REPLACE TEMP TABLE _offers AS
SELECT
    feature, document, sum(n)::BIGINT AS n, sum(total) AS total, arg_max(value, key) AS value,
    arg_max(context, key) AS context, arg_max(position, key) AS position, arg_max(place, key) AS place
FROM (
    SELECT
        b.*, p.document, p.place,
        abs(value::DOUBLE) * (
            1 + ((value > 0)::INTEGER * $local_max + $local_max - 1 - b.context % $local_max) / pow(2, 30)
        ) AS key
    FROM _best AS b JOIN _places AS p ON p.context = b.context
)
GROUP BY feature, document;

-- # document_features: are recomputed from activations (rows)
SELECT 'feature ' || feature || ', document ' || document || ': ' || coalesce(n, 0) || ' tokens, maximum '
    || coalesce(value, 0) || ', sum ' || coalesce(total, 0) || ', not ' || coalesce(f.n_tokens, 0) || ', '
    || coalesce(f.max, 0) || ', ' || coalesce(f.sum, 0)
FROM (SELECT * REPLACE (total::VARCHAR::DOUBLE / pow(2, 64) AS total) FROM _offers) AS o
FULL JOIN (
    SELECT * FROM $document_features
    WHERE sae = $sae AND document IN (SELECT document FROM $documents WHERE $kept)
) AS f USING (feature, document)
WHERE (o.n, o.value, o.total) IS DISTINCT FROM (f.n_tokens, f.max, f.sum);

-- # features: are recomputed from activations (all rows)
SELECT 'feature ' || feature || ': ' || coalesce(f.n_tokens, 0) || ' tokens, ' || coalesce(f.n_contexts, 0)
    || ' contexts, ' || coalesce(d.n_documents, 0) || ' documents, maximum ' || coalesce(f.max, 0) || ', not '
    || coalesce(m.n_tokens, 0) || ', ' || coalesce(m.n_contexts, 0) || ', ' || coalesce(m.n_documents, 0)
    || ', ' || coalesce(m.max, 0)
    || CASE WHEN (f.total, f.squares) IS DISTINCT FROM (m.total, m.squares) THEN '; sums differ' ELSE '' END
FROM (
    SELECT
        feature, sum(n)::BIGINT AS n_tokens, count(*) AS n_contexts, sum(total) AS total,
        sum(squares) AS squares, _furthest(max(value), min(value)) AS max
    FROM _best GROUP BY feature
) AS f
JOIN (SELECT feature, count(*) AS n_documents FROM _offers GROUP BY feature) AS d USING (feature)
FULL JOIN _merged AS m USING (feature)
WHERE (f.n_tokens, f.n_contexts, d.n_documents, f.total, f.squares, f.max)
    IS DISTINCT FROM (m.n_tokens, m.n_contexts, m.n_documents, m.total, m.squares, m.max);

-- # features: histograms are recomputed from activations (all rows)
SELECT 'feature ' || feature || ', bin ' || bin || ': ' || coalesce(r.n, 0) || ' tokens, not ' || coalesce(h.n, 0)
FROM (
    SELECT
        feature, greatest(0, least(193, 1 + floor((log2(abs(activation::DOUBLE)) + 10) * 8)))::INTEGER AS bin,
        count(*) AS n
    FROM $activations WHERE sae = $sae GROUP BY ALL
) AS r
FULL JOIN (
    SELECT feature, bin, sum(n)::BIGINT AS n
    FROM (
        SELECT feature, unnest(bins)::INTEGER AS bin, unnest(bin_tokens) AS n FROM $features WHERE sae = $sae
    )
    GROUP BY ALL
) AS h USING (feature, bin)
WHERE r.n IS DISTINCT FROM h.n;

-- Of the offers only those that are not below the last one shown can be among the top: fewer endings to read.
-- # top_contexts: are recomputed from activations (all rows)
WITH last AS (
    SELECT feature, abs(activation) AS lowest FROM _top WHERE rank = $top_k
), offers AS (
    SELECT o.*, c.tokens[greatest(position - 15, 0) + 1 : position + 1] AS ending
    FROM _offers AS o
    JOIN $contexts AS c ON c.context = o.context
    LEFT JOIN last ON last.feature = o.feature
    WHERE abs(value) >= coalesce(lowest, 0)
), unlike AS (
    SELECT * FROM offers
    QUALIFY row_number() OVER (PARTITION BY feature, ending ORDER BY abs(value) DESC, place) = 1
), ranked AS (
    SELECT *, row_number() OVER (PARTITION BY feature ORDER BY abs(value) DESC, place) AS rank FROM unlike
)
SELECT 'feature ' || feature || ', rank ' || rank || ': context ' || coalesce(r.context, -1) || ' position '
    || coalesce(r.position, -1) || ' (' || coalesce(r.value, 0) || '), not ' || coalesce(t.context, -1)
    || ' position ' || coalesce(t.position, -1) || ' (' || coalesce(t.activation, 0) || ')'
FROM (SELECT * FROM ranked WHERE rank <= $top_k) AS r
FULL JOIN _top AS t USING (feature, rank)
WHERE (r.context, r.position, r.value) IS DISTINCT FROM (t.context, t.position, t.activation);

-- # sampled_contexts: are recomputed from activations (all rows)
WITH strata AS (
    SELECT
        feature, floor(log2(abs(value::DOUBLE)))::INTEGER AS stratum, count(*) AS n,
        min_by(b.context, _lot($seed::UBIGINT, feature, place_hash), $sample_k) AS contexts
    FROM _best AS b JOIN _places AS p ON p.context = b.context
    GROUP BY ALL
), lots AS (
    SELECT s.feature, stratum, s.n, b.context, b.position, b.value
    FROM (SELECT * REPLACE (unnest(contexts) AS contexts) FROM strata) AS s
    JOIN _best AS b ON b.feature = s.feature AND b.context = s.contexts
)
SELECT 'feature ' || feature || ', stratum ' || stratum || ', context ' || context || ': '
    || CASE WHEN d.activation IS NULL THEN 'is left out'
        WHEN l.value IS NULL THEN 'is not of the lowest hashes'
        ELSE 'position ' || l.position || ' (' || l.value || ') of ' || l.n || ' contexts, not ' || d.position
            || ' (' || d.activation || ') of ' || d.stratum_contexts END
FROM lots AS l FULL JOIN _drawn AS d USING (feature, stratum, context)
WHERE (l.n, l.position, l.value) IS DISTINCT FROM (d.stratum_contexts, d.position, d.activation);
