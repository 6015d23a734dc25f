-- Density of a feature by vocabulary token
--
-- `n_tokens` is how often the token occurs among the counted ones, `active` on how many of them the feature
-- fires, `density` active by n_tokens. `share` is the token's share of all active tokens of the feature.
--
-- needs: activations of sae; contexts; vocabulary; every counted token of sae
-- param sae SAE: the SAE
-- param feature FEATURE: the feature
-- param min_tokens COUNT = 1: occurrences that a token must have
-- param sort active|density|n_tokens = active: highest first
-- param limit LIMIT = 20: rows
WITH read AS (
    SELECT
        context, unnest(range(len(tokens))) AS position, unnest(tokens) AS token, unnest(counted) AS counted
    FROM contexts
), fired AS (
    SELECT context, position, count(*) AS n FROM activations
    WHERE sae = $sae AND feature = $feature
    GROUP BY context, position
), tokens AS (
    SELECT r.token, count(*) AS n_tokens, coalesce(sum(f.n), 0)::BIGINT AS active
    FROM read AS r
    LEFT JOIN fired AS f ON f.context = r.context AND f.position = r.position
    WHERE r.counted
    GROUP BY r.token
)
SELECT
    $sae AS sae, $feature AS feature, t.token, v.text, t.n_tokens, t.active, t.active / t.n_tokens AS density,
    t.active / (SELECT sum(active) FROM tokens) AS share
FROM tokens AS t
JOIN vocabulary AS v ON v.token = t.token
WHERE t.n_tokens >= $min_tokens
ORDER BY CASE $sort WHEN 'n_tokens' THEN t.n_tokens WHEN 'density' THEN density ELSE t.active END DESC,
    t.n_tokens DESC, t.token
LIMIT $limit
