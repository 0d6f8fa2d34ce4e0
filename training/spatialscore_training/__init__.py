"""SpatialScore's data set, training recipe and evaluation.

Layout, in the order in which a pair comes to be and is learned:

- `drawings`    named drawings: fetched, named in plain words (`kinds.tsv`), scaled and kept
- `relations`   what a clause claims, and whether a layout keeps it: true, false, or too close to call
- `scenes`      layouts and their twins, and the pictures drawn from them
- `prompts`     clauses in people's words
- `pairs`       a prompt, a picture that keeps it and a twin that does not
- `manifest`    pairs on disk: shards, their validator and figures (`figures`)
- `tokenizer`, `model`   the small Qwen2.5-VL, from nothing
- `truth`       what the generator knows of each visual token
- `batches`, `train`     the stages of the recipe (`mini.toml`)
- `merge`, `export`, `evaluate`, `report`   the checkpoint that the server reads, and its figures
- `convert`     the same of what other trainers pickle
"""
