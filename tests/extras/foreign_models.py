"""Models of other origin as their users write them; executors import this module, so Keras is not imported here."""

from __future__ import annotations

import lightning
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

WORDS = 40
LENGTH = 6


def sentences(rows, *, seed=0):
    """(ids, mask, label): class 0 and 1 use different halves of the vocabulary; some sentences are padded."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, rows)
    half = WORDS // 2
    ids = rng.integers(1, half, (rows, LENGTH)) + half * label[:, None]
    mask = np.ones((rows, LENGTH), np.int64)
    mask[::3, LENGTH - 2 :] = 0
    return ids * mask, mask, label


def tiny_bert(dropout=0.1, seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=2,
        )
    )


def tiny_gpt2(dropout=0.1, seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_positions=LENGTH,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def counting(rows, *, seed=0):
    """Sequences that count upwards from some word, modulo WORDS: a language of one rule."""
    start = np.random.default_rng(seed).integers(0, WORDS, rows)
    return (start[:, None] + np.arange(LENGTH)) % WORDS


def last_words(output):
    """The word that follows each prefix, as the language model would choose it."""
    return output.logits.argmax(-1)


def blobs(rows, *, seed=0):
    """Three separable classes in 8 numbers."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(size=(3, 8)) * 2
    label = rng.integers(0, 3, rows)
    return (centers[label] + rng.normal(size=(rows, 8)) * 0.5).astype(np.float32), label


class LitNet(lightning.LightningModule):
    """A Lightning module as its documentation writes them: log, hparams, a scheduler clocked by epochs."""

    def __init__(self, width: int = 16, lr: float = 0.1, interval: str = "epoch"):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(width, 3)
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def forward(self, x):
        return self.head(self.layers(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        loss = F.cross_entropy(scores, y)
        self.accuracy(scores, y)
        self.log("train_accuracy", self.accuracy, prog_bar=True)
        self.log_dict({"batch": float(batch_idx), "epoch": float(self.current_epoch)})
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        self.log("val_accuracy", (scores.argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.hparams.interval}}


class LitOneCycle(LitNet):
    """Asks the Trainer how long the run is."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class LitByHand(LitNet):
    """Optimizes by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class LitTwoOptimizers(LitNet):
    """As for a GAN."""

    def configure_optimizers(self):
        return [torch.optim.SGD(self.layers.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)]


class LitPlateau(LitNet):
    """Its learning rate follows a score."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class LitClosure(LitNet):
    """Its optimizer needs a closure."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class LitAsksTrainer(LitNet):
    """Asks for what no replica knows."""

    def training_step(self, batch, batch_idx):
        self.trainer.save_checkpoint("here")
        return super().training_step(batch, batch_idx)


class LitClips(LitNet):
    """Overrides a hook that changes training."""

    def on_before_optimizer_step(self, optimizer):
        torch.nn.utils.clip_grad_value_(self.parameters(), 0.01)


class LitBuildsLate(LitNet):
    """Makes a layer where only a Trainer would call it."""

    def configure_model(self):
        self.late = nn.Linear(3, 3)


class LitForgets(LitNet):
    """Forgets to return its loss."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def two_towers():
    """A Keras network with two named inputs, moving averages and dropout."""
    import keras

    numbers, kind = keras.Input((8,), name="numbers"), keras.Input((), name="kind", dtype="int64")
    embedded = keras.layers.Embedding(4, 3)(kind)
    x = keras.layers.Concatenate()([numbers, embedded])
    x = keras.layers.Dense(16, activation="relu")(x)
    x = keras.layers.BatchNormalization(momentum=0.5)(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model({"numbers": numbers, "kind": kind}, keras.layers.Dense(3)(x))
