-- Co-firing by document: one feature against all
--
-- Of every feature that fires in documents of this one: in how many (`n_both`), the share of either's
-- documents that is, Jaccard index, lift P(both) / (P(one) P(other)) and PMI, its log2, in bits. P is over
-- the documents with counted tokens. It needs a row a document only.
--
-- needs: document_features of sae, other; features; documents
-- param sae SAE: the SAE
-- param feature FEATURE: the feature
-- param other SAE = $sae: the SAE of the other features; `all` for every one
-- param min_both COUNT = 5: documents on which both must fire
-- param sort jaccard|lift|n_both = jaccard: highest first
-- param limit LIMIT = 20: rows
WITH own AS (
    SELECT document FROM document_features WHERE sae = $sae AND feature = $feature
), most AS (
    SELECT 2 * (SELECT count(*) FROM own) > (SELECT count(*) FROM documents) AS are
), asked AS (
    -- Of a feature in most documents the others are looked at, and what fires there is taken from what fires
    -- anywhere: fewer rows.
    SELECT document FROM own WHERE NOT (SELECT are FROM most)
    UNION ALL
    SELECT document FROM documents WHERE (SELECT are FROM most) AND document NOT IN (SELECT document FROM own)
), found AS (
    -- (`sae` costs a third of the grouping where it is a column.)
    SELECT CASE WHEN $other IS NULL THEN sae ELSE $other END AS sae, feature, count(*) AS n
    FROM _by_document -- as `document_features`, in order of documents
    -- As a list, or DuckDB may take one feature's rows for more than the other SAE's and hash those.
    WHERE ($other IS NULL OR sae = $other) AND document IN (SELECT unnest(list(document)) FROM asked)
    GROUP BY ALL
), shared AS (
    SELECT
        o.sae, o.feature, o.n_documents,
        CASE WHEN (SELECT are FROM most) THEN o.n_documents - coalesce(f.n, 0) ELSE coalesce(f.n, 0) END AS n_both
    FROM _feature_counts AS o LEFT JOIN found AS f ON f.sae = o.sae AND f.feature = o.feature
    WHERE $other IS NULL OR o.sae = $other
), counted AS (
    SELECT count(*) AS n FROM documents WHERE n_tokens > 0
)
SELECT
    $sae AS sae, $feature AS feature, o.sae AS other_sae, o.feature AS other_feature, o.n_both,
    f.n_documents, o.n_documents AS other_n_documents,
    o.n_both / f.n_documents AS other_given_feature, o.n_both / o.n_documents AS feature_given_other,
    o.n_both / (f.n_documents + o.n_documents - o.n_both) AS jaccard,
    o.n_both::DOUBLE * c.n / f.n_documents / o.n_documents AS lift,
    log2(o.n_both::DOUBLE * c.n / f.n_documents / o.n_documents) AS pmi
FROM shared AS o
JOIN _feature_counts AS f ON f.sae = $sae AND f.feature = $feature
CROSS JOIN counted AS c
WHERE o.n_both >= $min_both AND NOT (o.sae = $sae AND o.feature = $feature)
ORDER BY CASE $sort WHEN 'lift' THEN lift WHEN 'n_both' THEN o.n_both ELSE jaccard END DESC, o.sae, o.feature
LIMIT $limit
