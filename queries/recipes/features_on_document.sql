-- Features that fired on a document, the strongest first
--
-- `n_tokens`, `max` and `sum` are over the document's active tokens, `share` is of its counted tokens;
-- strongest by absolute value. Activations of different SAEs are on different scales.
--
-- needs: document_features of sae; documents
-- param document DOCUMENT: its key, or its id
-- param sae SAE = all: one SAE
-- param limit LIMIT = 20: rows
SELECT f.sae, f.feature, f.n_tokens, f.n_tokens / d.n_tokens AS share, f.max, f.sum
FROM features_of($document) AS f
JOIN documents AS d ON d.document = $document
WHERE $sae IS NULL OR f.sae = $sae
ORDER BY abs(f.max) DESC, f.sae, f.feature
LIMIT $limit
