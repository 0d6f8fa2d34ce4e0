"""SpatialScore's data set, training recipe and evaluation.

Layout, in the order in which a pair comes to be and is learned:

- `drawings`    named drawings: fetched, named in plain words (`kinds.tsv`), scaled and kept
- `relations`   what a clause claims, and whether a layout keeps it: true, false, or too close to call
- `scenes`      layouts and their twins, and the pictures drawn from them
- `prompts`     clauses in people's words
- `language`    the same by a grammar (`grammar.toml`): benchmarks' forms, adjectives, denials, other words for a kind
- `pairs`       a prompt, a picture that keeps it and a twin that does not
- `manifest`    our pairs on disk: shards, their validator and figures (`figures`), and as the Hugging Face hub has them (`hub`)
- `pair_files`  pairs as files have them, a lab's own too: `data_sets` finds them, in `tables`, `tars` and lines, and `pictures` reads
                their pictures; `survey` tells what they are like as a whole
- `recipe`, `preprocessing`, `reward_model`, `train_reward`   a reward model of a Qwen-VL, by a recipe (`recipes/`)
- `run_state`, `calibration`   what a run keeps of itself, and what a validation says
- `tokenizer`, `model`   the small Qwen2.5-VL, from nothing
- `truth`       what the generator knows of each visual token
- `batches`, `train`     the stages of a recipe (`mini.toml`; `wide.toml` for what is to follow, by `start` from its weights)
- `merge`, `export`, `evaluate`, `report`   the checkpoint that the server reads, and its figures
- `goals`       every sort of prompt and picture that it should judge rightly, in one table
- `convert`     the same of what other trainers pickle
- `files`       refusals, and files that are whole or not there
"""
