"""An adapted model for other people's trainers, which want labels in, and loss and logits out."""

from spafit.interop.trainer import ConfigView, LossAndLogits, TrainerModel, for_trainer

__all__ = ["ConfigView", "LossAndLogits", "TrainerModel", "for_trainer"]
