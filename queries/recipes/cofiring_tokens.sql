-- Co-firing by token: one feature against all
--
-- Of every feature that fires on tokens of this one: on how many (`n_both`), the share of either's tokens
-- that is, Jaccard index, lift P(both) / (P(one) P(other)) and PMI, its log2, in bits. P is over the tokens
-- counted at both sites. Where `norm_above` makes these differ, P is over the tokens of
-- `documents.n_tokens`, of which one that is left out at a site counts as one on which nothing fires there.
--
-- needs: activations of sae, other; features; saes
-- param sae SAE: the SAE
-- param feature FEATURE: the feature
-- param other SAE = $sae: the SAE of the other features; `all` for every one
-- param min_both COUNT = 5: tokens on which both must fire
-- param sort jaccard|lift|n_both = jaccard: highest first
-- param limit LIMIT = 20: rows
WITH shared AS (
    SELECT sae, feature, count(*) AS n_both
    FROM _active_tokens -- as `activations`, with context and position in one number
    -- As a list, or DuckDB may take one feature's rows for more than the other SAE's and hash those.
    WHERE ($other IS NULL OR sae = $other)
        AND token IN (
            SELECT unnest(list(token)) FROM _active_tokens WHERE sae = $sae AND feature = $feature
        )
    GROUP BY sae, feature
    HAVING count(*) >= $min_both
), sizes AS (
    SELECT
        o.sae,
        CASE WHEN o.site = s.site AND o.model = s.model THEN s.n_tokens
            ELSE (SELECT sum(n_tokens) FROM documents) END AS counted
    FROM saes AS o, saes AS s
    WHERE s.sae = $sae AND ($other IS NULL OR o.sae = $other)
)
SELECT
    $sae AS sae, $feature AS feature, b.sae AS other_sae, b.feature AS other_feature, b.n_both,
    f.n_tokens, o.n_tokens AS other_n_tokens,
    b.n_both / f.n_tokens AS other_given_feature, b.n_both / o.n_tokens AS feature_given_other,
    b.n_both / (f.n_tokens + o.n_tokens - b.n_both) AS jaccard,
    b.n_both::DOUBLE * s.counted / f.n_tokens / o.n_tokens AS lift,
    log2(b.n_both::DOUBLE * s.counted / f.n_tokens / o.n_tokens) AS pmi
FROM shared AS b
JOIN _feature_counts AS f ON f.sae = $sae AND f.feature = $feature
JOIN _feature_counts AS o ON o.sae = b.sae AND o.feature = b.feature
JOIN sizes AS s ON s.sae = b.sae
WHERE NOT (b.sae = $sae AND b.feature = $feature)
ORDER BY CASE $sort WHEN 'lift' THEN lift WHEN 'n_both' THEN b.n_both ELSE jaccard END DESC, b.sae, b.feature
LIMIT $limit
