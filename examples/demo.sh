#!/usr/bin/env bash
# The main job on real input: corpus and model are put under out/demo, scanned through local Ray, and
# asked what fired. Running it again resumes, or finds nothing to do.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/demo

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

python examples/corpus.py $out
python examples/model.py $out/model.gguf
say corpuscope saes examples/saes/smollm2-135m-res
say corpuscope scan examples/demo.yaml
say corpuscope status $out/index
say corpuscope sql $out/index "
  SELECT s.sae, round(measured_l0, 1) AS l0, round(fvu, 3) AS fvu, count(*) FILTER (f.n_tokens = 0) AS dead,
    round(median(f.density), 5) AS median_density
  FROM saes s JOIN features f USING (sae) GROUP BY ALL ORDER BY s.sae"

# Features that a reader of Python recognises, each with the contexts that it fires on most.
layer21=smollm2-135m-res/layer_21/width_2k/average_l0_40
layer15=smollm2-135m-res/layer_15/width_2k/average_l0_40
say corpuscope features $out/index $layer21 --limit 5
say corpuscope sql $out/index "
  SELECT feature, n_tokens, n_documents, max, snippet(context, position, 6) AS fires_on
  FROM features JOIN top_contexts USING (sae, feature)
  WHERE sae = '$layer21' AND rank = 1 AND density < 0.003 AND n_documents > 60
  ORDER BY max DESC LIMIT 8"
say corpuscope feature $out/index $layer21 1553 -k 5   # raise
say corpuscope feature $out/index $layer15 516 -k 5    # the """ that opens a docstring
say corpuscope feature $out/index $layer21 33 -k 5     # must
say corpuscope feature $out/index $layer21 673 -k 5    # the @ of a decorator
