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
WITH shared AS (
    SELECT sae, feature, count(*) AS n_both
    FROM document_features
    -- As a list, or DuckDB may take one feature's rows for more than the other SAE's and hash those.
    WHERE ($other IS NULL OR sae = $other)
        AND document IN (
            SELECT unnest(list(document)) FROM document_features WHERE sae = $sae AND feature = $feature
        )
    GROUP BY sae, feature
    HAVING count(*) >= $min_both
), sizes AS (
    SELECT sae, (SELECT count(*) FROM documents WHERE n_tokens > 0) AS counted
    FROM saes
    WHERE $other IS NULL OR sae = $other
)
SELECT
    $sae AS sae, $feature AS feature, b.sae AS other_sae, b.feature AS other_feature, b.n_both,
    f.n_documents, o.n_documents AS other_n_documents,
    b.n_both / f.n_documents AS other_given_feature, b.n_both / o.n_documents AS feature_given_other,
    b.n_both / (f.n_documents + o.n_documents - b.n_both) AS jaccard,
    b.n_both::DOUBLE * s.counted / f.n_documents / o.n_documents AS lift,
    log2(b.n_both::DOUBLE * s.counted / f.n_documents / o.n_documents) AS pmi
FROM shared AS b
JOIN _feature_counts AS f ON f.sae = $sae AND f.feature = $feature
JOIN _feature_counts AS o ON o.sae = b.sae AND o.feature = b.feature
JOIN sizes AS s ON s.sae = b.sae
WHERE NOT (b.sae = $sae AND b.feature = $feature)
ORDER BY CASE $sort WHEN 'lift' THEN lift WHEN 'n_both' THEN b.n_both ELSE jaccard END DESC, b.sae, b.feature
LIMIT $limit
