"""An attention layer held over HTTP: one prefill and four steps give what one call over the whole sequence gives.

python -m examples.attention_session [URL]
"""

import sys

import numpy as np

from keypast import Client


def main(url: str | None = None, model: str = "attention") -> float:
    """Returns the largest difference between stepping and recomputing."""
    generator = np.random.default_rng(0)
    with Client(url) as client:
        hidden = next(card for card in client.models() if card.id == model).inputs[0].shape[-1]
        query, key, value = generator.normal(size=(3, 1, 12, int(hidden))).astype(np.float16)
        causal = np.tri(12, dtype=np.float16)[None]

        with client.sessions.create(model) as session:
            whole = session.prefill(query=query, key=key, value=value, attention_mask=causal)

        with client.sessions.create(model) as session:
            first = session.prefill(
                query=query[:, :8], key=key[:, :8], value=value[:, :8], attention_mask=causal[:, :8, :8]
            )
            parts = [first]
            for at in range(8, 12):
                new = slice(at, at + 1)
                parts.append(session.step(query=query[:, new], key=key[:, new], value=value[:, new]))
            print(f"{session}: 8 positions prefilled, 4 stepped")

    stepped = np.concatenate([np.asarray(part.attn_out, dtype=np.float32) for part in parts], axis=1)
    difference = float(np.abs(stepped - np.asarray(whole.attn_out)).max())
    print(f"largest difference from recomputing all 12: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:])
