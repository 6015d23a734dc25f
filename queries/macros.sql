-- Macros over the views; made after them.

-- Bytes given in hexadecimal as text; what is not UTF-8 (characters cut at an edge) becomes U+FFFD.
CREATE MACRO _decoded(hexed) AS decode(unhex(array_to_string(list_transform(
    regexp_extract_all(
        hexed,
        '[0-7][0-9A-F]'
        || '|(?:C[2-9A-F]|D[0-9A-F])[89AB][0-9A-F]'
        || '|(?:E0[AB][0-9A-F]|E[1-9ABCEF][89AB][0-9A-F]|ED[89][0-9A-F])[89AB][0-9A-F]'
        || '|(?:F0[9AB][0-9A-F]|F[123][89AB][0-9A-F]|F48[0-9A-F])[89AB][0-9A-F][89AB][0-9A-F]'
        || '|(?:F0[9AB][0-9A-F]|F[123][89AB][0-9A-F]|F48[0-9A-F])[89AB][0-9A-F]'
        || '|(?:E0[AB][0-9A-F]|E[1-9ABCEF][89AB][0-9A-F]|ED[89][0-9A-F])'
        || '|(?:F0[9AB][0-9A-F]|F[123][89AB][0-9A-F]|F48[0-9A-F])'
        || '|[0-9A-F]{2}'
    ),
    lambda u: CASE
        WHEN u < '80' THEN u
        WHEN length(u) = 4 AND u < 'E0' THEN u
        WHEN length(u) = 6 AND u >= 'E0' AND u < 'F0' THEN u
        WHEN length(u) = 8 THEN u
        ELSE 'EFBFBD'
    END
), '')));

CREATE MACRO _token_text(ids) AS _decoded((
    SELECT string_agg(hex(_v.bytes), '' ORDER BY _t.i)
    FROM (SELECT unnest(ids) AS token, generate_subscripts(ids, 1) AS i) AS _t
    JOIN vocabulary AS _v ON _v.token = _t.token
));

-- The text of a context as run: its tokens' bytes joined, then decoded.
-- Parameters and aliases begin with an underscore so that no argument's column is taken for one of them.
CREATE MACRO context_text(_context) AS (
    SELECT _token_text(_c.tokens) FROM contexts AS _c WHERE _c.context = _context
);

-- The text of the tokens from `_width` before a position to `_width` after it.
CREATE MACRO snippet(_context, _position, _width) AS (
    SELECT _token_text(_c.tokens[greatest(_position - _width, 0) + 1 : _position + _width + 1])
    FROM contexts AS _c WHERE _c.context = _context
);

-- Every feature that fired in a document, the strongest first; quick in a compacted index, however large.
CREATE MACRO features_of(_document) AS TABLE
    SELECT sae, feature, n_tokens, max, sum FROM _by_document
    WHERE document = _document
    ORDER BY abs(max) DESC, sae, feature;

-- A feature's k highest contexts with their documents and the text around the maximum.
CREATE MACRO top(_sae, _feature, _k) AS TABLE
    SELECT _top.rank, _top.activation, _d.id, _d.corpus, _d.source, _d.row, _top.context, _top.position,
        snippet(_top.context, _top.position, 20) AS text, _top.positions, _top.values
    FROM top_contexts AS _top
    JOIN contexts AS _c ON _c.context = _top.context
    JOIN documents AS _d ON _d.document = _c.document
    WHERE _top.sae = _sae AND _top.feature = _feature AND _top.rank <= _k
    ORDER BY _top.rank;
