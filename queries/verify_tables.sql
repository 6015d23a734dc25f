-- What `verify` asks of the tables that have no SAE. A statement with a title (`-- # table: check`) gives one
-- row of text for each fault; the others prepare. _facts: what is committed of the shown units; _registered:
-- what the registry says of them. $names as in views.sql.

CREATE TEMP TABLE _places AS
SELECT c.context, c.document, c.place_hash, u.place * $local_max + c.context % $local_max AS place
FROM $contexts AS c JOIN _units AS u ON u.ordinal = c.context // $local_max;

-- # documents: are of their unit
SELECT 'document ' || d.document || ' says ' || d.corpus || ' ' || d.source || ' row ' || d.row || ' run ' || d.run
FROM $documents AS d
LEFT JOIN _registered AS r ON r.ordinal = d.document // $local_max
WHERE r.ordinal IS NULL OR (d.corpus, d.source, d.run) <> (r.corpus, r.path, r.run)
    OR d.row NOT BETWEEN r.start AND r.stop - 1;

-- # quarantine: is of its unit
SELECT 'document ' || d.document || ' says ' || d.source || ' row ' || d.row
FROM $quarantine AS d
LEFT JOIN _registered AS r ON r.ordinal = d.document // $local_max
WHERE r.ordinal IS NULL OR d.source <> r.path OR d.row NOT BETWEEN r.start AND r.stop - 1;

-- # documents: read = indexed + quarantined, each row once
SELECT 'document ' || document || ': row ' || row || ' comes after row ' || before
FROM (
    SELECT document, row, lag(row) OVER (PARTITION BY document // $local_max ORDER BY document, row) AS before
    FROM (SELECT document, row FROM $documents UNION ALL SELECT document, row FROM $quarantine)
)
WHERE before >= row;

-- # documents: are as many as were committed
SELECT 'unit ' || f.ordinal || ': ' || coalesce(d.n, 0) || ' documents with ' || coalesce(d.tokens, 0)
    || ' counted tokens, ' || f.documents || ' with ' || f.tokens || ' were committed'
FROM _facts AS f
LEFT JOIN (
    SELECT document // $local_max AS ordinal, count(*) AS n, sum(n_tokens) AS tokens FROM $documents GROUP BY ALL
) AS d ON d.ordinal = f.ordinal
WHERE (coalesce(d.n, 0), coalesce(d.tokens, 0)) <> (f.documents, f.tokens);

-- # contexts: are as many as were committed
SELECT 'unit ' || f.ordinal || ': ' || coalesce(c.n, 0) || ' contexts, ' || f.contexts || ' were committed'
FROM _facts AS f
LEFT JOIN (SELECT context // $local_max AS ordinal, count(*) AS n FROM _places GROUP BY ALL) AS c
    ON c.ordinal = f.ordinal
WHERE coalesce(c.n, 0) <> f.contexts;

-- # quarantine: is as much as was committed
SELECT 'unit ' || f.ordinal || ': ' || coalesce(q.n, 0) || ' documents, ' || f.quarantined || ' were committed'
FROM _facts AS f
LEFT JOIN (SELECT document // $local_max AS ordinal, count(*) AS n FROM $quarantine GROUP BY ALL) AS q
    ON q.ordinal = f.ordinal
WHERE coalesce(q.n, 0) <> f.quarantined;

-- # contexts: hold every token of their document once
WITH own AS (
    SELECT
        document, context, start, start + len(tokens) - first AS stop,
        lag(start + len(tokens) - first) OVER each AS before,
        lead(start) OVER each AS next
    FROM $contexts
    WINDOW each AS (PARTITION BY document ORDER BY context)
)
SELECT 'context ' || context || ' has tokens ' || start || ' to ' || stop || ' of document ' || o.document
    || coalesce(', which has ' || _length, ', which is not there')
FROM own AS o LEFT JOIN $documents AS d ON d.document = o.document
WHERE d.document IS NULL OR start <> coalesce(before, 0) OR stop <> coalesce(next, _length)
UNION ALL
SELECT 'document ' || document || ' has ' || _length || ' tokens and no context'
FROM $documents
WHERE _length > 0 AND document NOT IN (SELECT document FROM _places);

-- # contexts: begin as the settings say
SELECT 'context ' || context || ' begins with token ' || tokens[1] || ', its own begin at ' || first
FROM $contexts
WHERE first <> ($bos IS NOT NULL)::INTEGER + least($overlap, start) OR tokens[1] <> $bos
    OR ($skip_first AND counted[1]);

-- # contexts: repeat the overlap
SELECT 'context ' || context || ' does not repeat what is before it'
FROM (
    SELECT *, lag(tokens) OVER (PARTITION BY document ORDER BY context) AS before
    FROM $contexts
    WHERE $overlap > 0
)
WHERE before IS NOT NULL
    AND tokens[first - least($overlap, start) + 1 : first] <> before[len(before) - least($overlap, start) + 1 :];

-- # contexts: count what documents count
SELECT 'document ' || d.document || ' has ' || coalesce(c.n, 0) || ' counted tokens, not ' || d.n_tokens
FROM $documents AS d
LEFT JOIN (
    SELECT document, sum(len(list_filter(counted, lambda x: x))) AS n FROM $contexts GROUP BY document
) AS c ON c.document = d.document
WHERE coalesce(c.n, 0) <> d.n_tokens;

-- # contexts: have the hash of their place
SELECT 'context ' || c.context
FROM $contexts AS c JOIN $documents AS d ON d.document = c.document
WHERE c.place_hash <> _place_hash(d.corpus, d.source, d.row, c.start);

-- # segments: hold every token of their document once
WITH each AS (
    SELECT
        *, row_number() OVER w - 1 AS number, lag(stop) OVER w AS before, lead(start) OVER w AS next
    FROM $segments
    WINDOW w AS (PARTITION BY document ORDER BY segment)
)
SELECT 'segment ' || segment || ' has tokens ' || start || ' to ' || stop || ' of document ' || e.document
    || coalesce(', which has ' || _length, ', which is not there')
FROM each AS e LEFT JOIN $documents AS d ON d.document = e.document
WHERE d.document IS NULL OR segment <> number OR start <> coalesce(before, 0) OR stop <> coalesce(next, _length);

-- # segments: of excluded roles have no counted token
SELECT 'segment ' || segment || ' of document ' || s.document || ' (' || role || ')'
FROM $segments AS s
JOIN $contexts AS c
    ON c.document = s.document AND c.start < s.stop AND s.start < c.start + len(c.tokens) - c.first
WHERE list_contains($excluded_roles, role) AND list_contains(
    c.counted[c.first + greatest(s.start - c.start, 0) + 1 : c.first + least(s.stop - c.start, len(c.tokens))],
    true
);

-- # by_document: has the rows of document_features
SELECT 'rows of ' || coalesce(f.sae, d.sae)
FROM (
    SELECT sae::VARCHAR AS sae, count(*) AS n, sum(hash(feature, document, n_tokens, max, sum)::HUGEINT) AS h
    FROM $document_features GROUP BY ALL
) AS f
FULL JOIN (
    SELECT sae::VARCHAR AS sae, count(*) AS n, sum(hash(feature, document, n_tokens, max, sum)::HUGEINT) AS h
    FROM $by_document GROUP BY ALL
) AS d ON d.sae = f.sae
WHERE (f.n, f.h) IS DISTINCT FROM (d.n, d.h);
