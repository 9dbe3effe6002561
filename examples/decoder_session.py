"""A language model's session: stream a reply, fork it in two, roll one back.

python -m examples.decoder_session [URL]
"""

import sys

from keypast import Client


def main(url: str | None = None, model: str = "smollm2-135m") -> list[str]:
    """Returns the three texts: the reply, and what each branch went on with."""
    with Client(url) as client, client.sessions.create(model) as session:
        session.prefill(text="The capital of France is")
        start = session.valid_length[0]

        reply = []
        for token in session.generate(stream=True, max_tokens=12):
            print(token.text, end="", flush=True)
            reply.append(token.text)
        print()

        with session.fork() as branch:  # shares every block until one of the two writes
            branch.prefill(text=" In winter,")
            winter = branch.generate(max_tokens=8).outputs.text[0]
            print(f"branch:      In winter,{winter}")

        session.truncate(start)  # exactly as if nothing had been generated
        again = session.generate(max_tokens=12).outputs.text[0]
        print(f"rolled back:{again}")
    return ["".join(reply), winter, again]


if __name__ == "__main__":
    main(*sys.argv[1:])
