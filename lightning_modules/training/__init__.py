"""What Lightning trains: a model that forgets, what its losses compare with, and what watches it.

| file | content |
|---|---|
| `module` | `UnlearningModule`: two losses, one optimizer, validation |
| `objectives` | from a loss of `gradsurgery.losses` and a batch to one number |
| `heads` | the model as backbone and head, so that only answer tokens cost logits |
| `references` | where the outputs of the start model come from |
| `adapters` | low-rank adapters, at random or by FILA |
| `uld` | `ULDModule`, `train_assistant`: unlearning by an assistant's logits |
| `scratch` | the small Llama that is trained from scratch |
| `probability` | how probable answers are: the one way of scoring while training |
| `warmup`, `token_count` | learning rates, and means over processes, that the modules share |
| `callbacks` | what watches a run |

Two models besides the trained one have names. The start model is the model before unlearning, which some losses compare
with. The reference is a model that never saw the forget set, which unlearning should come close to.
"""
