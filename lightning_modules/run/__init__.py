"""From options to a finished folder.

| file | content |
|---|---|
| `unlearn`, `evaluate`, `finetune`, `report`, `ledger`, `ledger_plan` | a command each |
| `arguments`, `options` | flags; and what they may be, in groups |
| `run` | the run that is under way, which the files below are given |
| `loading`, `models`, `places`, `adapter_folders`, `compatible`, `benchmarks` | examples, models and tokenizers |
| `first`, `teaching` | `--finetune-first`: what is taught before |
| `plan`, `held`, `memory`, `compiling` | what a run would do, and in how much memory |
| `settling`, `radius` | what a run finds out before it trains: where it ends, its learning rate, its radius |
| `assembly`, `methods`, `sharded`, `finish`, `plugins` | what trains |
| `scoring`, `kept_scores`, `reference_log`, `identity`, `overlap` | scores, and which may be used again |
| `probing` | attacks at the end |
| `deletion`, `batch`, `measured` | what a run with a ledger refuses, protects and enters |
| `saving`, `saved`, `resume` | the model and the options in the folder, and going on from them |
| `show`, `quiet`, `group` | what is printed, what is not, and the processes' end |
"""
