-- Features that fired on a phrase
--
-- Every occurrence of the phrase's UTF-8 bytes inside a context, however the tokenizer cut it; its tokens
-- are those that hold one of its bytes. `occurrences` is on how many of them a feature fires, `share` of
-- all, `n_tokens` on how many of their tokens, `max` the furthest from 0 there, `density` its density
-- everywhere. What a context only repeats of the one before is not looked at, nor a phrase that two contexts
-- share.
--
-- needs: activations of sae; contexts; features
-- param phrase TEXT: the phrase, as it stands in the text: with its blanks, upper and lower case
-- param sae SAE = all: one SAE
-- param limit LIMIT = 20: rows
WITH RECURSIVE wanted AS (
    SELECT hex(encode($phrase)) AS phrase, octet_length(encode($phrase)) AS n
), spelled AS (
    SELECT token, hex(bytes) AS bytes, octet_length(bytes) AS n FROM vocabulary WHERE octet_length(bytes) > 0
), begins AS (
    -- Tokens that have the phrase's first bytes after `skip` of their own: `matched` of them, or all.
    SELECT s.token, s.skip, least(s.n - s.skip, w.n) AS matched
    FROM (SELECT token, bytes, n, unnest(range(n)) AS skip FROM spelled) AS s, wanted AS w
    WHERE starts_with(w.phrase, substr(s.bytes, 2 * s.skip + 1, 2 * w.n))
), parts AS (
    SELECT skip AS matched, len, substr(phrase, 2 * skip + 1, 2 * len) AS bytes
    FROM (SELECT phrase, n, unnest(range(1, n)) AS skip FROM wanted), unnest(range(1, n - skip + 1)) AS t(len)
), continues AS (
    -- Tokens that go on after `matched` bytes, up to `then`: whole ones, and those that begin with the rest.
    SELECT s.token, p.matched, p.matched + p.len AS then
    FROM spelled AS s JOIN parts AS p ON p.bytes = s.bytes
    UNION
    SELECT s.token, p.matched, w.n
    FROM (SELECT token, left(bytes, 2 * unnest(range(1, n))::BIGINT) AS start FROM spelled) AS s
    JOIN parts AS p ON p.bytes = s.start
    JOIN wanted AS w ON p.matched + p.len = w.n
), trails AS (
    SELECT
        r.context, r.position, b.skip, r.position AS last, b.matched,
        r.tokens[r.position + 2 : r.position + w.n] AS rest
    FROM (
        SELECT context, tokens, unnest(tokens) AS token, unnest(range(len(tokens))) AS position FROM contexts
    ) AS r
    JOIN begins AS b ON b.token = r.token, wanted AS w
    UNION ALL
    SELECT t.context, t.position, t.skip, t.last + 1, c.then, t.rest[2:]
    FROM trails AS t JOIN continues AS c ON c.token = t.rest[1] AND c.matched = t.matched
), occurrences AS (
    SELECT row_number() OVER () AS occurrence, t.context, t.position, t.last
    FROM trails AS t
    JOIN contexts AS c ON c.context = t.context
    WHERE t.matched = (SELECT n FROM wanted) AND t.last >= c.first
), places AS (
    SELECT occurrence, context, unnest(range(position, last + 1)) AS position FROM occurrences
), active AS (
    SELECT
        a.sae, a.feature,
        count(DISTINCT p.occurrence) AS occurrences,
        count(DISTINCT (a.context, a.position)) AS n_tokens,
        max(a.activation) AS highest, min(a.activation) AS lowest
    FROM activations AS a
    JOIN places AS p ON p.context = a.context AND p.position = a.position
    WHERE $sae IS NULL OR a.sae = $sae
    GROUP BY a.sae, a.feature
)
SELECT
    a.sae, a.feature, a.occurrences, a.occurrences / (SELECT count(*) FROM occurrences) AS share, a.n_tokens,
    CASE WHEN -lowest > highest THEN lowest ELSE highest END AS max, f.density
FROM active AS a
JOIN features AS f ON f.sae = a.sae AND f.feature = a.feature
ORDER BY share DESC, f.density, a.sae, a.feature
LIMIT $limit
