"""Continue a prompt, or hold a conversation, at a terminal or from a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

from gptj_train.config import GenerateConfig
from gptj_train.data.chat_template import TemplateFailedError, render, template_in, to_jinja
from gptj_train.errors import UserError
from gptj_train.inference.text_generator import TextGenerator

Message = dict[str, str]


class PromptLoop:
    """Answers prompts one by one; an interrupt or a bad prompt returns to the question.

    Raises:
        UserError: ``chat=true`` without a template; of a single prompt or a pipe, also what ``TextGenerator`` raises.
    """

    def __init__(self, generator: TextGenerator, cfg: GenerateConfig) -> None:
        self._generator = generator
        self._cfg = cfg
        self._messages: list[Message] = []
        self._template = ""
        if cfg.chat:
            template = cfg.chat_template if cfg.chat_template is not None else template_in(cfg.checkpoint)
            if template is None:
                raise UserError(
                    f"chat=true: {cfg.checkpoint} has no chat template; give that of its training, such as "
                    "chat_template='### {role}\\n{content}\\n\\n'"
                )
            # The shell and Hydra pass \n on as two characters.
            self._template = to_jinja(template.replace("\\n", "\n"))

    def run(self) -> None:
        """Answer ``prompt`` if there is one, else each line of stdin."""
        if self._cfg.prompt is not None:
            self._answer(self._cfg.prompt)
            return
        interactive = sys.stdin.isatty()
        # The recipe turns Ctrl-C into the end of the run. Here it ends a text, and the model stays loaded.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for prompt in _prompts(interactive):
            try:
                self._answer(prompt)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n(stopped)", flush=True)
            except UserError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _answer(self, prompt: str) -> None:
        if self._cfg.chat:
            self._reply(prompt)
        else:
            self._stream(prompt, self._cfg.stop_strings, shown_first=prompt)

    def _stream(self, prompt: str, stop: list[str], shown_first: str = "") -> str:
        """Print the continuation of a prompt as it grows, and return it."""
        pieces = self._generator.stream(prompt, stop, **self._cfg.options)
        # The prompt and the first piece together: an invalid option is then an error before any text.
        text = next(pieces)
        print(shown_first + text, end="", flush=True)
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
        print(flush=True)
        if not text:
            print("(no text: the first token ends it)", file=sys.stderr, flush=True)
        return text

    # --- conversation ---

    def _reply(self, content: str) -> None:
        """Print the assistant's next message. The conversation keeps both messages, or none if it is interrupted."""
        messages = [*self._messages, {"role": "user", "content": content}]
        messages = self._fitting(messages)
        stop = [*self._cfg.stop_strings, *self._end_of_reply()]
        reply = self._stream(self._rendered(messages), stop)
        self._messages = [*messages, {"role": "assistant", "content": reply.strip()}]

    def _rendered(self, messages: list[Message], *, prompt: bool = True) -> str:
        try:
            return render(self._template, messages, add_generation_prompt=prompt)
        except TemplateFailedError as error:
            raise UserError(f"the chat template fails ({error}); give another by chat_template='...'") from None

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """Drop the oldest exchanges until conversation and reply fit the model's positions."""
        room = self._generator.model.config.n_positions - (self._cfg.max_new_tokens or 1)
        dropped = 0
        while len(messages) > 1 and len(self._generator.encode(self._rendered(messages))) > room:
            messages = messages[2:]
            dropped += 2
        if dropped:
            print(f"(the oldest {dropped} messages no longer fit and are forgotten)", file=sys.stderr, flush=True)
        return messages

    def _end_of_reply(self) -> list[str]:
        """Return what the template writes between a reply and the next message: a model may write on from there."""
        reply, following = "REPLY", "FOLLOWING"
        messages = [
            {"role": "user", "content": "QUESTION"},
            {"role": "assistant", "content": reply},
            {"role": "user", "content": following},
        ]
        _, _, rest = self._rendered(messages, prompt=False).partition(reply)
        between, _, _ = rest.partition(following)
        # Special tokens do not show in a text: one of them alone is what ends it.
        inside = [token for token in self._generator.tokenizer.special_tokens if token in between]
        if inside:
            return [min(inside, key=between.index)]
        return [between] if between.strip() else []


def _prompts(interactive: bool) -> Iterator[str]:
    """Yield the prompts typed at a terminal, or the lines of a pipe, until end of file.

    Raises:
        UserError: an empty pipe.
    """
    if interactive:
        # The import alone gives input() a history and the arrow keys.
        import readline  # noqa: F401
    count = 0
    interrupted = False
    while True:
        try:
            prompt = input("prompt> " if interactive else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            # Once clears the line, as in a shell; twice ends.
            if interrupted or not interactive:
                break
            interrupted = True
            print("\n(Ctrl-C once more, or Ctrl-D, ends)")
            continue
        interrupted = False
        if prompt.strip():
            count += 1
            yield prompt
    if count == 0 and not interactive:
        raise UserError("no prompt: give prompt='some text', prompts=FILE, or type them")
