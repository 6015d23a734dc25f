-- Features that never fired
--
-- `dead` and `dead_share` say how many of the SAE's features did not, `counted` on how many tokens.
--
-- needs: features
-- param sae SAE = all: one SAE
-- param limit LIMIT = 20: rows
SELECT
    f.sae, f.feature, s.layer, s.n_tokens AS counted,
    count(*) OVER (PARTITION BY f.sae) AS dead,
    count(*) OVER (PARTITION BY f.sae) / s.width AS dead_share
FROM features AS f
JOIN saes AS s ON s.sae = f.sae
WHERE f.n_tokens = 0 AND ($sae IS NULL OR f.sae = $sae)
ORDER BY f.sae, f.feature
LIMIT $limit
