-- The same feature in a wider SAE, by document
--
-- Feature splitting: `covered` is the share of this feature's documents on which the other one fires,
-- `within` the share of the other one's that lie in this one's. A copy has both near 1; a part of a split
-- one is within 1 and covers some.
--
-- needs: document_features of sae, other; features
-- param sae SAE: the narrower SAE
-- param feature FEATURE: its feature
-- param other WIDER: a wider SAE at the same site
-- param min_both COUNT = 5: documents on which both must fire
-- param sort jaccard|covered|within = jaccard: highest first
-- param limit LIMIT = 20: rows
WITH shared AS (
    SELECT sae, feature, count(*) AS n_both
    FROM document_features
    -- As a list, or DuckDB may take one feature's rows for more than the other SAE's and hash those.
    WHERE sae = $other
        AND document IN (
            SELECT unnest(list(document)) FROM document_features WHERE sae = $sae AND feature = $feature
        )
    GROUP BY sae, feature
    HAVING count(*) >= $min_both
)
SELECT
    $sae AS sae, $feature AS feature, b.sae AS other_sae, b.feature AS other_feature, b.n_both,
    f.n_documents, o.n_documents AS other_n_documents,
    b.n_both / f.n_documents AS covered, b.n_both / o.n_documents AS within,
    b.n_both / (f.n_documents + o.n_documents - b.n_both) AS jaccard
FROM shared AS b
JOIN _feature_counts AS f ON f.sae = $sae AND f.feature = $feature
JOIN _feature_counts AS o ON o.sae = b.sae AND o.feature = b.feature
ORDER BY CASE $sort WHEN 'covered' THEN covered WHEN 'within' THEN within ELSE jaccard END DESC, b.feature
LIMIT $limit
