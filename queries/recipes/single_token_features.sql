-- Features that fire on one vocabulary token
--
-- `share` is the share of a feature's active tokens that are its most frequent one (the lowest id of
-- equals), `token_share` the share of that token's counted occurrences on which the feature fires.
--
-- needs: activations of sae; contexts; features
-- param sae SAE: the SAE
-- param share DOUBLE = 0.9: lowest share shown
-- param min_tokens COUNT = 10: active tokens that a feature must have
-- param limit LIMIT = 20: rows
WITH read AS (
    SELECT
        context, unnest(range(len(tokens))) AS position, unnest(tokens) AS token, unnest(counted) AS counted
    FROM contexts
), occurring AS (
    SELECT token, count(*) AS n FROM read WHERE counted GROUP BY token
), able AS (
    -- A feature that fires more often than any token occurs cannot be one token's.
    SELECT feature, n_tokens FROM features
    WHERE sae = $sae AND n_tokens >= $min_tokens AND $share * n_tokens <= (SELECT max(n) FROM occurring)
), pairs AS (
    SELECT a.feature, r.token, count(*) AS n
    FROM activations AS a
    JOIN read AS r ON r.context = a.context AND r.position = a.position
    WHERE a.sae = $sae AND a.feature IN (SELECT feature FROM able)
    GROUP BY a.feature, r.token
    QUALIFY row_number() OVER (PARTITION BY a.feature ORDER BY n DESC, r.token) = 1
)
SELECT
    $sae AS sae, p.feature, p.token, v.text, p.n / able.n_tokens AS share, p.n / o.n AS token_share,
    able.n_tokens, o.n AS occurrences
FROM pairs AS p
JOIN able ON able.feature = p.feature
JOIN occurring AS o ON o.token = p.token
JOIN vocabulary AS v ON v.token = p.token
WHERE p.n >= $share * able.n_tokens
ORDER BY share DESC, able.n_tokens DESC, p.feature
LIMIT $limit
