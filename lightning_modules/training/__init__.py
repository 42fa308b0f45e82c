"""What Lightning trains: a model that forgets, what its losses compare with, and what watches it.

| file | content |
|---|---|
| `module` | `UnlearningModule`: two losses, one optimizer, validation |
| `objectives` | from a loss of `gradsurgery.losses` and a batch to one number |
| `heads` | the model as backbone and head, so that only answer tokens cost logits |
| `padding_free`, `packing`, `recomputing` | fewer tokens, 4-bit weights, and less memory on the way through the model |
| `references`, `switching` | where the outputs of the start model come from |
| `adapters`, `merging` | low-rank adapters, at random or by FILA, and how they become weights again |
| `perturb`, `auto_radius`, `noise`, `finish` | what `--recipe deep` adds |
| `anchoring` | reading what is to be kept into an anchor, `--retain-anchor` |
| `adversary`, `undo` | two other methods for forgetting that lasts |
| `protecting` | earlier requests of a ledger that stay forgotten |
| `uld` | `ULDModule`, `train_assistant`: unlearning by an assistant's logits |
| `finetuning`, `scratch` | teaching a model what it is to forget later, and the small Llama |
| `probability`, `displacement` | how probable answers are while training; how far weights went |
| `learning_rate`, `warmup` | a rate that is found, and rates that rise and fall |
| `trainer`, `sharding`, `soundness`, `token_count` | what Lightning is told; what is asked of a batch; means |
| `resuming`, `checkpoint_file` | so that a resumed run is the uninterrupted one |
| `adapter_settings`, `uld_settings`, `finetuning_settings`, `counts` | settings, which the command line shows |
| `callbacks` | what watches a run |

Two models besides the trained one have names. The start model is the model before unlearning, which some losses compare
with. The reference is a model that never saw the forget set, which unlearning should come close to.
"""
