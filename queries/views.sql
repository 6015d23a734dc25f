-- The views of an index (shared/contract section 4 gives their meaning), over committed files only.
-- $name stands for a list of files, or an empty relation of the same columns; pipelines/schema.py has
-- the columns as written. Summaries are partials of disjoint units, merged here: counts and sums add,
-- maxima and lowest hashes are taken again. Sums are fixed point, so the order of adding never shows.
-- What is highest is so by absolute value, for signed architectures; the rest cannot tell the difference.

-- Units in corpus order: `place` breaks ties the same way whatever the history of scans.
CREATE VIEW _units AS
SELECT unnest(range(first, stop)) AS ordinal, place + generate_subscripts(range(first, stop), 1) - 1 AS place
FROM $units;

CREATE VIEW _declared_saes AS SELECT * FROM $declared_saes;

-- SAEs of the spec that were not scanned because another one has the same tensors at the same site.
CREATE VIEW _duplicates AS SELECT * FROM $duplicates;

CREATE VIEW runs AS SELECT * FROM $runs;

CREATE VIEW vocabulary AS SELECT token, text, bytes FROM $vocabulary;

CREATE VIEW documents AS
SELECT document, id, corpus, source, row, run, n_tokens$metadata FROM $documents;

-- Documents that could not be scanned. Of a file that cannot be read on, the row is the first unreadable one.
CREATE VIEW quarantine AS SELECT source, row, id, error FROM $quarantine;

CREATE VIEW segments AS
SELECT document, segment, role, start, stop FROM $segments
UNION ALL
SELECT document, 0::INTEGER, 'text', 0::INTEGER, _length
FROM $documents
WHERE document NOT IN (SELECT document FROM $segments);

CREATE VIEW contexts AS SELECT context, document, start, first, tokens, counted FROM $contexts;

-- An SAE whose `keep` leaves rows out has none here: asking for it is an error, never a partial answer.
-- (Where there is none, `len(…)` leaves no condition, which every row group would be asked about: 27 of 60 ms.)
-- Every column of the guard is an error too, so that a filter on any of them meets it instead of a NULL.
CREATE VIEW activations AS
SELECT sae, feature, token // $length AS context, (token % $length)::INTEGER AS position, activation
FROM $activations
WHERE (len($not_kept_tokens) = 0 OR NOT list_contains($not_kept_tokens, sae))
UNION ALL
SELECT sae, error(why)::INTEGER, error(why)::BIGINT, error(why)::INTEGER, error(why)::FLOAT
FROM (
    SELECT sae, 'activations of ' || sae || ' were not all kept (`keep` of the spec); `saes` shows each keep, '
        || '`sampled_activations` holds the rows of sampled documents' AS why
    FROM (SELECT unnest($not_kept_tokens) AS sae)
)
WHERE error(why) IS NULL;

-- The same with context and position in one number, for recipes that ask which rows share a token: comparing
-- it takes under half the time of comparing pairs.
CREATE VIEW _active_tokens AS
SELECT sae, feature, token, activation FROM $activations
WHERE (len($not_kept_tokens) = 0 OR NOT list_contains($not_kept_tokens, sae))
UNION ALL
SELECT sae, feature, context, activation FROM activations
WHERE len($not_kept_tokens) > 0 AND list_contains($not_kept_tokens, sae);

CREATE VIEW sampled_activations AS
SELECT sae, feature, token // $length AS context, (token % $length)::INTEGER AS position, activation
FROM $activations;

CREATE VIEW document_features AS
SELECT sae, feature, document, n_tokens, max, sum FROM $document_features
UNION ALL
SELECT sae, error(why)::INTEGER, error(why)::BIGINT, error(why)::INTEGER, error(why)::FLOAT, error(why)::DOUBLE
FROM (
    SELECT sae, 'document_features of ' || sae || ' were not kept (`keep: none` of the spec)' AS why
    FROM (SELECT unnest($not_kept_documents) AS sae)
)
WHERE error(why) IS NULL;

-- The same rows in files that are sorted by document, once they are compacted.
CREATE VIEW _by_document AS
SELECT sae, feature, document, n_tokens, max, sum FROM $by_document
UNION ALL
SELECT sae, feature, document, n_tokens, max, sum FROM document_features
WHERE len($not_kept_documents) > 0 AND list_contains($not_kept_documents, sae);

-- Reconstruction error and L0. Components are added in their order, so that doubles add up alike each time.
CREATE VIEW saes AS
WITH means AS (
    SELECT sae, list_aggregate(list(component ORDER BY i), 'sum') AS squared_sum
    FROM (
        SELECT sae, i, pow(_fixed(0, sum(x), $sample_bits), 2) AS component
        FROM (SELECT sae, unnest(sample_sum) AS x, generate_subscripts(sample_sum, 1) AS i FROM $saes)
        GROUP BY sae, i
    )
    GROUP BY sae
), totals AS (
    SELECT
        sae,
        sum(n_tokens)::BIGINT AS n_tokens,
        sum(n_active)::BIGINT AS n_active,
        sum(sample_tokens)::BIGINT AS sample_tokens,
        _fixed(sum(squares_high), sum(squares_low), $sample_bits) AS squares,
        _fixed(sum(error_high), sum(error_low), $sample_bits) AS error
    FROM $saes
    GROUP BY sae
)
SELECT
    d.sae, d.suite, d.model, d.site, d.layer, d.architecture, d.d_in, d.width, d.nominal_l0,
    t.n_active / nullif(t.n_tokens, 0) AS measured_l0,
    CASE WHEN t.squares - m.squared_sum / nullif(t.sample_tokens, 0) > 0
        THEN t.error / (t.squares - m.squared_sum / t.sample_tokens) END AS fvu,
    coalesce(t.n_tokens, 0) AS n_tokens,
    d.keep, d.activation_convention, d.trained_on, d.neuronpedia, d.fingerprint, d.uri
FROM _declared_saes AS d
LEFT JOIN totals AS t USING (sae)
LEFT JOIN means AS m USING (sae);

-- How many features of each SAE were ever active; `features` says so too, and merges histograms for it.
CREATE VIEW _live_features AS
SELECT sae, count(DISTINCT feature) AS n FROM $features WHERE n_tokens > 0 GROUP BY sae;

-- Every feature of every SAE: partials, and one row of zeros each so that dead ones are there.
CREATE VIEW features AS
WITH counted AS (SELECT sae, sum(n_tokens)::BIGINT AS n FROM $saes GROUP BY sae),
merged AS (
    SELECT
        sae,
        feature,
        sum(n_tokens)::BIGINT AS n_tokens,
        sum(n_contexts)::BIGINT AS n_contexts,
        sum(n_documents)::BIGINT AS n_documents,
        _fixed(sum(sum_high), sum(sum_low), 64) AS total,
        _fixed(sum(squares_high), sum(squares_low), 56) AS squares,
        _furthest(max(max), min(max)) AS max
    FROM (
        SELECT sae, feature, n_tokens, n_contexts, n_documents, sum_high, sum_low, squares_high, squares_low, max
        FROM $features
        UNION ALL
        SELECT sae, unnest(range(width))::INTEGER, 0, 0, 0, 0, 0, 0, 0, NULL FROM _declared_saes
    )
    GROUP BY sae, feature
), bins AS (
    SELECT sae, feature, bin, sum(n)::BIGINT AS n
    FROM (SELECT sae, feature, unnest(bins)::INTEGER AS bin, unnest(bin_tokens) AS n FROM $features)
    GROUP BY sae, feature, bin
), ranked AS (
    SELECT
        sae, feature, bin, n,
        sum(n) OVER (PARTITION BY sae, feature ORDER BY bin) AS below,
        sum(n) OVER (PARTITION BY sae, feature) AS n_all
    FROM bins
), histograms AS (
    SELECT
        sae,
        feature,
        min(bin) FILTER (below >= 0.5 * n_all) AS bin50,
        min(bin) FILTER (below >= 0.9 * n_all) AS bin90,
        min(bin) FILTER (below >= 0.99 * n_all) AS bin99,
        list(bin ORDER BY bin) AS bins,
        list(n ORDER BY bin) AS ns
    FROM ranked
    GROUP BY sae, feature
)
SELECT
    m.sae,
    m.feature,
    m.n_tokens,
    m.n_contexts,
    m.n_documents,
    m.n_tokens / nullif(c.n, 0) AS density,
    m.total / nullif(m.n_tokens, 0) AS mean_active,
    CASE WHEN m.n_tokens > 0 THEN
        sqrt(greatest(m.squares / m.n_tokens - pow(m.total / m.n_tokens, 2), 0))
    END AS std_active,
    m.max,
    _bin_value(h.bin50, abs(m.max)) AS p50,
    _bin_value(h.bin90, abs(m.max)) AS p90,
    _bin_value(h.bin99, abs(m.max)) AS p99,
    CASE WHEN m.n_tokens > 0 THEN
        list_transform(range(194), lambda b: coalesce(h.ns[list_position(h.bins, b::INTEGER)], 0))
    END AS histogram
FROM merged AS m
LEFT JOIN counted AS c ON c.sae = m.sae
LEFT JOIN histograms AS h ON h.sae = m.sae AND h.feature = m.feature;

-- Counts of the features that fired, alone: `features` has to make the histograms for them too.
CREATE VIEW _feature_counts AS
SELECT
    sae, feature,
    sum(n_tokens)::BIGINT AS n_tokens, sum(n_contexts)::BIGINT AS n_contexts, sum(n_documents)::BIGINT AS n_documents
FROM $features
GROUP BY sae, feature;

-- One candidate a document in the partials already; of equal endings the highest stays, then the k highest.
CREATE VIEW _top_contexts AS
WITH offers AS (
    SELECT t.*, u.place * $local_max + t.context % $local_max AS place
    FROM $top_contexts AS t JOIN _units AS u ON u.ordinal = t.context // $local_max
), unlike AS (
    SELECT * FROM offers
    QUALIFY row_number() OVER (PARTITION BY sae, feature, ending ORDER BY abs(activation) DESC, place) = 1
)
SELECT
    sae, feature,
    (row_number() OVER (PARTITION BY sae, feature ORDER BY abs(activation) DESC, place))::INTEGER AS rank,
    context, position, activation, offsets, values
FROM unlike
QUALIFY row_number() OVER (PARTITION BY sae, feature ORDER BY abs(activation) DESC, place) <= $top_k;

-- A sample's hash is made of its context's place and its feature as sae_runtime/summaries.py does it, so that
-- a unit's files need not hold it; merged ones do.
CREATE VIEW _sampled_contexts AS
WITH salted AS (
    SELECT s.*, _wrapped(e.seed + _times(s.feature, 11400714819323198485)) AS h
    FROM $sampled_contexts AS s JOIN $seeds AS e ON e.sae = s.sae
), salts AS (
    SELECT * REPLACE (xor(h, h >> 31) AS h)
    FROM (SELECT * REPLACE (_mixed(h, 27, 10723151780598845931) AS h)
    FROM (SELECT * REPLACE (_mixed(h, 30, 13787848793156543929) AS h) FROM salted))
), placed AS (
    SELECT s.* REPLACE (xor(s.h, c.place_hash) AS h)
    FROM salts AS s
    JOIN $contexts AS c ON c.context = s.context
), hashed AS (
    SELECT * EXCLUDE (h), xor(h, h >> 31) AS hash
    FROM (SELECT * REPLACE (_mixed(h, 27, 10723151780598845931) AS h)
    FROM (SELECT * REPLACE (_mixed(h, 30, 13787848793156543929) AS h) FROM placed))
    UNION ALL BY NAME
    SELECT * FROM $sampled_merged
), drawn AS (
    SELECT h.*, u.place * $local_max + h.context % $local_max AS place
    FROM hashed AS h JOIN _units AS u ON u.ordinal = h.context // $local_max
)
SELECT
    sae, feature, stratum,
    (sum(population) OVER (PARTITION BY sae, feature, stratum))::BIGINT AS stratum_contexts,
    context, position, activation, offsets, values
FROM drawn
QUALIFY row_number() OVER (PARTITION BY sae, feature, stratum ORDER BY hash, place) <= $sample_k;

-- Windows are in the partials, or in `activations` where `keep: tokens` has every row there.
-- (Sorting lists of pairs takes two thirds of the time of two ordered aggregates.)
CREATE VIEW top_contexts AS
SELECT
    sae, feature, rank, context, position, activation,
    list_transform(offsets, lambda o: position + o) AS positions, values
FROM _top_contexts
WHERE len($not_kept_tokens) > 0 AND list_contains($not_kept_tokens, sae)
UNION ALL
SELECT
    sae, feature, rank, context, position, activation,
    list_transform(near, lambda n: n.p), list_transform(near, lambda n: n.a)
FROM (
    SELECT * REPLACE (list_sort(near) AS near)
    FROM (
        SELECT
            t.sae, t.feature, t.rank, t.context, t.position, t.activation,
            list({p: (a.token % $length)::INTEGER, a: a.activation}) AS near
        FROM _top_contexts AS t
        JOIN $activations AS a
            ON a.sae = t.sae AND a.feature = t.feature AND a.token // $length = t.context
            AND abs(a.token % $length - t.position) <= $window
        WHERE (len($not_kept_tokens) = 0 OR NOT list_contains($not_kept_tokens, t.sae))
        GROUP BY ALL
    )
);

CREATE VIEW sampled_contexts AS
SELECT
    sae, feature, stratum, stratum_contexts, context, position, activation,
    list_transform(offsets, lambda o: position + o) AS positions, values
FROM _sampled_contexts
WHERE len($not_kept_tokens) > 0 AND list_contains($not_kept_tokens, sae)
UNION ALL
SELECT
    sae, feature, stratum, stratum_contexts, context, position, activation,
    list_transform(near, lambda n: n.p), list_transform(near, lambda n: n.a)
FROM (
    SELECT * REPLACE (list_sort(near) AS near)
    FROM (
        SELECT
            t.sae, t.feature, t.stratum, t.stratum_contexts, t.context, t.position, t.activation,
            list({p: (a.token % $length)::INTEGER, a: a.activation}) AS near
        FROM _sampled_contexts AS t
        JOIN $activations AS a
            ON a.sae = t.sae AND a.feature = t.feature AND a.token // $length = t.context
            AND abs(a.token % $length - t.position) <= $window
        WHERE (len($not_kept_tokens) = 0 OR NOT list_contains($not_kept_tokens, t.sae))
        GROUP BY ALL
    )
);

-- What `annotate` adds; empty before. A feature's highest (sign 1) and lowest (-1) output tokens.
CREATE VIEW feature_tokens AS SELECT sae, feature, sign, rank, token, logit FROM $feature_tokens;

-- The features whose decoder rows point alike, of the same SAE and of others.
CREATE VIEW feature_neighbours AS
SELECT sae, feature, rank, other_sae, other_feature, cosine FROM $feature_neighbours;

-- The length of a feature's decoder row as published.
CREATE VIEW feature_decoders AS SELECT sae, feature, norm FROM $feature_decoders;

CREATE VIEW explanations AS
SELECT sae, feature, description, method, model, score, source FROM $explanations;
