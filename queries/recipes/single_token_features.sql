-- Features that fire on one vocabulary token
--
-- `share` is the share of a feature's active tokens that are its most frequent one (the lowest id of equals),
-- `token_share` the share of that token's counted occurrences on which the feature fires.
--
-- needs: activations of sae; contexts; features
-- param sae SAE: the SAE
-- param share DOUBLE = 0.9: lowest share shown
-- param min_tokens COUNT = 10: active tokens that a feature must have
-- param limit LIMIT = 20: rows
WITH read AS (
    SELECT context, unnest(tokens) AS token, unnest(counted) AS counted, unnest(range(len(tokens))) AS position
    FROM contexts
), occurring AS (
    SELECT token, count(*) AS n FROM read WHERE counted GROUP BY token
), able AS (
    SELECT feature, n_tokens FROM features
    WHERE sae = $sae AND n_tokens >= $min_tokens AND $share * n_tokens <= (SELECT max(n) FROM occurring)
), pairs AS (
    -- A token that occurs too seldom for a feature cannot be the one, so most pairs are never grouped.
    SELECT a.feature, r.token, any_value(able.n_tokens) AS n_tokens, any_value(o.n) AS occurrences, count(*) AS n
    FROM activations AS a
    JOIN able ON able.feature = a.feature
    JOIN read AS r ON r.context = a.context AND r.position = a.position
    JOIN occurring AS o ON o.token = r.token
    WHERE a.sae = $sae AND o.n >= $share * able.n_tokens
    GROUP BY a.feature, r.token
    HAVING count(*) >= $share * any_value(able.n_tokens)
    QUALIFY row_number() OVER (PARTITION BY a.feature ORDER BY count(*) DESC, r.token) = 1
)
SELECT
    $sae AS sae, p.feature, p.token, v.text, p.n / p.n_tokens AS share, p.n / p.occurrences AS token_share,
    p.n_tokens, p.occurrences
FROM pairs AS p
JOIN vocabulary AS v ON v.token = p.token
ORDER BY share DESC, p.n_tokens DESC, p.feature
LIMIT $limit
