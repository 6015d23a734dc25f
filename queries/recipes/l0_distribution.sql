-- How many features of an SAE fire on a token
--
-- Mean and quantiles of L0 over the counted tokens of the SAE: p10 is the least number that a tenth of them
-- does not exceed. `none` is the tokens on which nothing fires.
--
-- needs: activations of sae; saes
-- param sae SAE = all: one SAE
WITH tokens AS (
    SELECT sae, token, count(*) AS l0
    FROM _active_tokens -- as `activations`, with context and position in one number
    WHERE $sae IS NULL OR sae = $sae
    GROUP BY sae, token
), counts AS (
    SELECT sae, l0, count(*) AS n FROM tokens GROUP BY sae, l0
    UNION ALL
    SELECT s.sae, 0, s.n_tokens - (SELECT count(*) FROM tokens AS t WHERE t.sae = s.sae)
    FROM saes AS s
    WHERE $sae IS NULL OR s.sae = $sae
), ranked AS (
    SELECT
        sae, l0, n, sum(n) OVER (PARTITION BY sae ORDER BY l0) AS upto,
        sum(n) OVER (PARTITION BY sae) AS n_all
    FROM counts
)
SELECT
    s.sae, s.layer, s.width, s.n_tokens, coalesce(sum(r.n) FILTER (r.l0 = 0), 0)::BIGINT AS none,
    sum(r.l0 * r.n) / s.n_tokens AS mean,
    min(r.l0) FILTER (r.n > 0) AS min,
    min(r.l0) FILTER (r.upto >= 0.1 * r.n_all) AS p10,
    min(r.l0) FILTER (r.upto >= 0.5 * r.n_all) AS p50,
    min(r.l0) FILTER (r.upto >= 0.9 * r.n_all) AS p90,
    min(r.l0) FILTER (r.upto >= 0.99 * r.n_all) AS p99,
    max(r.l0) FILTER (r.n > 0) AS max
FROM ranked AS r
JOIN saes AS s ON s.sae = r.sae
GROUP BY s.sae, s.layer, s.width, s.n_tokens
ORDER BY s.layer, s.sae
