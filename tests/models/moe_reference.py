"""A mixture of experts as in its papers, in numpy, one token at a time."""

import numpy as np
import scipy.special


def feed_forward(p, x, expert=...):
    """What one expert makes of one token; "gate" is there in gated layers (SiLU, else ReLU)."""
    h = linear(p["in"], x, expert)
    if "gate" in p:
        gate = linear(p["gate"], x, expert)
        h = h * gate * scipy.special.expit(gate)
    else:
        h = np.maximum(h, 0)
    return linear(p["out"], h, expert)


def linear(p, x, expert=...):
    return x @ p["kernel"][expert] + (p["bias"][expert] if "bias" in p else 0)


def mixture(p, row, k, capacity=None, is_token=None, how="auto"):
    """Tokens [L, D] of one row: outputs, and who was served by which experts, in order.

    Switch (k=1): the most probable expert, times its probability. Mixtral: softmax over the logits
    of the best k, which is their probabilities over the sum of these. With a capacity all first
    choices come before all second ones. A shared expert is every token's, times its gate.
    """
    logits = row @ p["router"]["kernel"]
    is_probability = how == "probability" or (how == "auto" and k == 1)
    queues = {expert: [] for expert in range(logits.shape[1])}
    out = np.zeros_like(row)
    for choice in range(k):
        for t in range(len(row)):
            if is_token is not None and not is_token[t]:
                continue
            best = np.argsort(-logits[t], kind="stable")[:k]
            expert = best[choice]
            probabilities = scipy.special.softmax(logits[t])
            weight = probabilities[expert]
            if not is_probability:
                weight = weight / probabilities[best].sum()
            if capacity is not None and len(queues[expert]) == capacity:
                continue
            queues[expert].append(t)
            out[t] += weight * feed_forward(p["experts"], row[t], expert)
    if "shared_expert" in p:
        shared = np.stack([feed_forward(p["shared_expert"], x) for x in row])
        if "shared_expert_gate" in p:
            shared = shared * scipy.special.expit(row @ p["shared_expert_gate"]["kernel"])
        out = out + shared
    return out, queues
