-- Features whose top contexts have their maximum on one vocabulary token
--
-- `share` is the share of the kept top contexts whose maximum is on the most frequent token (the lowest id
-- of equals). That says nothing of weak activations; `single_token_features` does, and needs all of them.
--
-- needs: top_contexts; contexts; features
-- param sae SAE: the SAE
-- param share DOUBLE = 0.9: lowest share shown
-- param min_contexts COUNT = 10: top contexts that a feature must have
-- param limit LIMIT = 20: rows
WITH maxima AS (
    SELECT t.feature, c.tokens[t.position + 1] AS token
    FROM _top_contexts AS t -- as `top_contexts`, without the activations around the maximum
    JOIN contexts AS c ON c.context = t.context
    WHERE t.sae = $sae
), pairs AS (
    SELECT feature, token, count(*) AS n, sum(count(*)) OVER (PARTITION BY feature) AS n_contexts
    FROM maxima
    GROUP BY feature, token
    QUALIFY row_number() OVER (PARTITION BY feature ORDER BY n DESC, token) = 1
)
SELECT $sae AS sae, p.feature, p.token, v.text, p.n / p.n_contexts AS share, p.n_contexts, f.n_tokens, f.max
FROM pairs AS p
JOIN features AS f ON f.sae = $sae AND f.feature = p.feature
JOIN vocabulary AS v ON v.token = p.token
WHERE p.n_contexts >= $min_contexts AND p.n >= $share * p.n_contexts
ORDER BY share DESC, p.n_contexts DESC, abs(f.max) DESC, p.feature
LIMIT $limit
