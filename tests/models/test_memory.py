"""What a steering step holds: activations of saved rows only, no graph, no large logits."""

import gc

import numpy as np
import torch
from oracle import random_weights, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from boe_vllm.models.build import random_model
from boe_vllm.models.rows import SequenceRows, pack
from boe_vllm.sampling.log_probs import LogProbabilities
from boe_vllm.sampling.statistics import RowWrites, read_statistics
from boe_vllm.steering.importance import TokenImportance
from boe_vllm.steering.step import DenoisingPass

CPU = torch.device("cpu")


def live_tensors():
    gc.collect()
    return {id(x): x for x in gc.get_objects() if type(x) is torch.Tensor}


def sequences_of(config, *, lengths, masked, keep):
    rng = np.random.default_rng(0)
    made = []
    for length in lengths:
        tokens = rng.integers(0, 25, length)
        tokens[-masked:] = config.mask_token_id
        made.append(
            SequenceRows(
                tokens=tokens, logit_positions=np.arange(length - masked, length), keep=keep
            )
        )
    return made


def run(model, sequences):
    layout = pack(sequences, CPU)
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    return layout, hidden, saved


def test_only_saved_rows_leave_activations_behind():
    config = small_config()
    model = random_model(config)
    model.load_weights(random_weights(config).items())
    # Once before, so that what passes share (the network's scratch) is there already.
    run(model, sequences_of(config, lengths=[60, 40], masked=5, keep="none"))
    before = live_tensors()
    layout, hidden, saved = run(
        model, sequences_of(config, lengths=[60, 40], masked=5, keep="masked")
    )
    kept, rows, width, inner = 10, 100, config.d_model, config.mlp_hidden_size
    new = [x for key, x in live_tensors().items() if key not in before]
    assert all(x.grad_fn is None and not x.requires_grad for x in new)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in new}
    keys_and_values = 2 * rows * width
    per_layer = kept * (2 * width + width + 2 * inner) + keys_and_values
    head = kept * (2 * width + width // config.n_heads) + 4 * rows * 8
    # A fifth more than the formula: index tensors. One inactive row more per layer would not fit.
    assert sum(storages.values()) <= 4 * (config.n_layers * per_layer + head) * 1.2
    shapes = {tuple(x.shape) for layer in saved.layers for x in vars_of(layer)}
    assert {shape[0] for shape in shapes} == {kept, rows}
    assert all(len(shape) == 3 for shape in shapes if shape[0] == rows)  # keys and values alone


def vars_of(layer):
    values = (getattr(layer, name) for name in layer.__slots__)
    return [value for value in values if value is not None]


def test_a_plain_pass_leaves_nothing_behind():
    config = small_config()
    model = random_model(config)
    _, _, saved = run(model, sequences_of(config, lengths=[60], masked=5, keep="none"))
    assert saved is None


class Largest(TorchDispatchMode):
    """The largest result with as many columns as the vocabulary."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.bytes = vocab_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == self.vocab_size:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


def test_no_row_by_vocabulary_tensor_outgrows_the_budget():
    config = small_config(vocab_size=509, embedding_size=512, mask_token_id=508)
    model = random_model(config)
    sequences = sequences_of(config, lengths=[80, 70], masked=40, keep="masked")
    budget = 64 * 1024
    with Largest(config.vocab_size) as largest:
        layout, hidden, saved = run(model, sequences)
        log_probs = LogProbabilities(
            model,
            hidden,
            mask_token_id=508,
            constraint_R=np.zeros(80, np.int64),
            budget_bytes=budget,
        )
        writes = RowWrites(temperature=np.ones(80), uniform=np.full(80, 0.3), top_logprobs=2)
        read_statistics(log_probs, writes, keep=True)
        current = DenoisingPass(
            model=model,
            sequences=tuple(sequences),
            layout=layout,
            log_probs=log_probs,
            saved=saved,
        )
        everyone = np.arange(40)
        query = TokenImportance(
            candidates=everyone,
            objective=everyone,
            active=everyone,
            surrogate="kv",
            context="frozen",
            sharpen=0.5,
        )
        TokenImportance.solve(current, [(0, query), (1, query)])
    assert 0 < largest.bytes <= budget < 80 * config.vocab_size * 4
