-- Drift of an SAE's features between two dates, or ranges of any metadata column
--
-- Set a is the documents whose $column is from $a_from to below $a_to, b the same; they must not overlap.
-- Dates are written 2024-05-01, text compares by its characters. Most changed first. `rate` is the share of
-- a set's documents (with counted tokens) in which the feature fires, `density` its active tokens per
-- counted token of them; `log2_rate` and `log2_density` compare a with b, half an event added to each and
-- one to its size, so that none is infinite. Densities are NULL where `norm_above` leaves out tokens of the
-- SAE, as it is not known of which documents. `corpuscope diff` tests differences of rates.
--
-- needs: document_features of sae; documents; saes
-- param sae SAE: the SAE
-- param column COLUMN: a column of documents
-- param a_from TEXT = all: where a begins
-- param a_to TEXT = all: where a ends, itself not in it
-- param b_from TEXT = all: where b begins
-- param b_to TEXT = all: where b ends, itself not in it
-- param min_documents COUNT = 5: documents of both sets in which a feature must fire
-- param limit LIMIT = 20: rows
WITH ranges AS (
    SELECT
        document, n_tokens,
        ($a_from IS NULL OR x >= $a_from) AND ($a_to IS NULL OR x < $a_to) AS a,
        ($b_from IS NULL OR x >= $b_from) AND ($b_to IS NULL OR x < $b_to) AS b
    FROM (SELECT document, n_tokens, struct_extract(d, $column) AS x FROM documents AS d)
    WHERE n_tokens > 0 AND x IS NOT NULL
), sets AS (
    SELECT document, n_tokens, a
    FROM ranges
    WHERE CASE WHEN a AND b THEN error('the two ranges of ' || $column || ' share documents') ELSE a OR b END
), sizes AS (
    SELECT
        count(*) FILTER (a) AS a_n, count(*) FILTER (NOT a) AS b_n,
        sum(n_tokens) FILTER (a) AS a_counted, sum(n_tokens) FILTER (NOT a) AS b_counted
    FROM sets
    HAVING CASE WHEN a_n > 0 AND b_n > 0 THEN true
        ELSE error('the two ranges of ' || $column || ' do not both have documents') END
), exact AS (
    SELECT (SELECT n_tokens FROM saes WHERE sae = $sae) = (SELECT sum(n_tokens) FROM documents) AS whole
), fired AS (
    SELECT
        f.feature,
        count(*) FILTER (s.a) AS a_documents, count(*) FILTER (NOT s.a) AS b_documents,
        coalesce(sum(f.n_tokens) FILTER (s.a), 0) AS a_active,
        coalesce(sum(f.n_tokens) FILTER (NOT s.a), 0) AS b_active
    FROM document_features AS f
    JOIN sets AS s ON s.document = f.document
    WHERE f.sae = $sae
    GROUP BY f.feature
    HAVING count(*) >= $min_documents
)
SELECT
    $sae AS sae, f.feature, f.a_documents, f.b_documents,
    f.a_documents / s.a_n AS a_rate, f.b_documents / s.b_n AS b_rate,
    log2((f.a_documents + 0.5) / (s.a_n + 1) / ((f.b_documents + 0.5) / (s.b_n + 1))) AS log2_rate,
    CASE WHEN e.whole THEN f.a_active / s.a_counted END AS a_density,
    CASE WHEN e.whole THEN f.b_active / s.b_counted END AS b_density,
    CASE WHEN e.whole THEN
        log2((f.a_active + 0.5) / (s.a_counted + 1) / ((f.b_active + 0.5) / (s.b_counted + 1)))
    END AS log2_density
FROM fired AS f, sizes AS s, exact AS e
ORDER BY abs(coalesce(log2_density, log2_rate)) DESC, f.feature
LIMIT $limit
