"""Trainers of others, with the optimizer in them. Nothing here imports a trainer before you do.

| trainer | how |
|---|---|
| `transformers.Trainer`, TRL's `SFTTrainer` | `gradsurgery.integrations.transformers.SurgeryTrainerMixin` |
| Accelerate | `gradsurgery.integrations.accelerate.unwrap` |
| Lightning | nothing is needed: ``training_step`` returns ``optimizer.join(...)`` |
"""
