-- Documents that do not activate a feature
--
-- A uniform sample of the documents with counted tokens, none of which activates it, by a hash of their
-- place in the corpus. It needs a row a document only, so it answers where `inactive_contexts` cannot.
--
-- needs: document_features of sae; documents
-- param sae SAE: the SAE
-- param feature FEATURE: the feature
-- param seed INTEGER = 0: another one draws others
-- param limit LIMIT = 20: rows
SELECT $sae AS sae, $feature AS feature, d.document, d.id, d.corpus, d.source, d.row, d.n_tokens AS counted
FROM documents AS d
WHERE d.n_tokens > 0
    AND d.document NOT IN (SELECT document FROM document_features WHERE sae = $sae AND feature = $feature)
ORDER BY md5(concat_ws('/', $seed, d.corpus, d.source, d.row)), d.document
LIMIT $limit
