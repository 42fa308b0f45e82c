"""The optimizer: how one step goes from a batch to changed parameters and a record.

A step is a window of one or more micro-batches. It has four holders: `Window` (what has been captured, and where the
step stands), `Rows` (what the Gram matrix is taken over), `Update` (what was decided) and `Record` (what the user
reads).

| stage | what happens | file |
|---|---|---|
| batch -> rows | each backward pass writes its row, in a context or by `join` | `front_ends`, `capture`, `join` |
| average | moving averages stand in for protected rows | `average` |
| rows -> Gram matrix | one pass, by blocks that share a matrix, in a metric | `rows`, `scope`, `metric` |
| Gram matrix -> update | the rule decides; added rows, clipping; the update goes to ``.grad`` | `update` |
| ... by coordinates | the same for rules that need the rows themselves | `elementwise` |
| base step | clipping and GradScaler read ``.grad``, then the base optimizer steps | `surgery` |
| guard | the parameter change is measured, and projected where it harms a protected objective | `guard` |
| end | averages are committed, the record is kept, the window is cleared | `average`, `record`, `surgery` |

`front_ends` has the verbs `objective`, `join` and `combine`, `surgery` the constructor, `step` and saving. `options`
holds what may be chosen, and set between steps; `gru` has the paper's defaults. `clipping` and `scaler` notice whoever
clips or unscales before `combine`. Around a step: `wrapper` delegates to the base what is the base's own, `checkpoint`
keeps averages and rule states in the base's state_dict, `ranks` checks that all processes do the same, and `dual` is
another optimizer, whose objectives take turns, and `anchor` holds layers after the step of any optimizer.
"""
