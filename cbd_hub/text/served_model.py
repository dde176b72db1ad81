"""A writer of text behind a server that speaks the OpenAI protocol (vLLM, ``transformers serve`` and others)."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from cbd_hub.errors import RecipeError
from cbd_hub.text.generators import Continuation
from cbd_hub.text.settings import Sampling

__all__ = ["ServerGenerator"]


_NO_ANSWER = "does not answer as the OpenAI protocol says; check that base_url leads to /v1 of such a server. It sent"


class ServerGenerator:
    """Writes with a model behind a server that speaks the OpenAI protocol; needs ``pip install "cbd_hub[server]"``."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        parallel: int = 4,
        retries: int = 5,
        timeout: float = 120,
        *,
        chat: bool = False,
        start: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Prepares a client; nothing is sent yet.

        Args:
            base_url: where the server's paths begin, as a rule ``http://host:port/v1``.
            model: its name on the server. It stands for the model in :attr:`identity`, the address does not.
            api_key: sent as a bearer token; never stored.
            parallel: requests at a time.
            retries: further tries after 408, 409, 429, 5xx, a time-out or a lost connection. The client waits as long
                as Retry-After says (up to two minutes), else half a second, doubled each time up to eight.
            timeout: seconds that one try may take.
            chat: a prompt is a user's message, and the text the answer to it.
            start: sent for an empty prompt, which servers refuse: the begin-of-text token as text, such as ``"<s>"``.
            extra: further fields of each request, such as ``{"repetition_penalty": 1.1}`` for vLLM.

        Raises:
            RecipeError: the client is not installed, or `base_url` or `parallel` is malformed.
        """
        try:
            import openai
        except ImportError as error:
            raise RecipeError('A server needs the openai client: pip install "cbd_hub[server]".') from error
        if not base_url.startswith(("http://", "https://")):
            raise RecipeError(f"base_url must begin with http:// or https://, got {base_url!r}.")
        if parallel < 1:
            raise RecipeError(f"parallel must be 1 or more, got {parallel}.")
        self.base_url, self.model, self.parallel = base_url, model, parallel
        self.chat, self.start, self.extra = chat, start, extra or {}
        # Without a key the client would take OPENAI_API_KEY and send it to whatever server this is.
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or "none", max_retries=retries, timeout=timeout
        )
        self._openai = openai

    @property
    def identity(self) -> dict[str, Any]:
        """The kind, the model's name and what is added to each request."""
        names = ("model", "chat", "start", "extra")
        return {"kind": "server", **{name: getattr(self, name) for name in names}}

    def generate(self, prompts: Sequence[str], sampling: Sampling, first: int = 0) -> Iterator[Continuation]:
        """Yields one continuation a prompt, in order, with `parallel` requests under way.

        Greedy text (temperature 0) is reproducible; sampled text only from a server that obeys the seed of each
        request whatever else it is doing. ``transformers serve`` does not; it samples only where the model's
        ``generation_config`` says ``do_sample``, and some tokenizers lose the space that its text begins with.

        Args:
            prompts: plain text, or messages with `chat`.
            sampling: how the next token is chosen; what is left at its default is left to the server.
            first: number of the first prompt.

        Raises:
            RecipeError: the server cannot be reached, refuses the key, the model or the request, keeps failing, or
                answers something else than text.
        """
        numbered = iter(enumerate(prompts, first))
        running: deque[Future[Continuation]] = deque()
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                while True:
                    for number, prompt in islice(numbered, 2 * self.parallel - len(running)):
                        running.append(pool.submit(self._ask, prompt, sampling, number))
                    if not running:
                        return
                    yield running.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask(self, prompt: str, sampling: Sampling, number: int) -> Continuation:
        if not prompt and not self.chat:
            if self.start is None:
                raise RecipeError("A prompt is empty, and servers refuse that; set start to the begin-of-text token.")
            prompt = self.start
        body: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens}
        if sampling.temperature > 0:
            body["seed"] = sampling.row_seed(number)
            body |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        more = {**({"top_k": sampling.top_k} if sampling.top_k and sampling.temperature else {}), **self.extra}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        endpoint: Any = self._client.chat.completions if self.chat else self._client.completions
        try:
            answer = endpoint.create(model=self.model, extra_body=more, **body)
        except (self._openai.OpenAIError, ValueError) as error:
            raise RecipeError(f"The server at {self.base_url} {self._explain(error)}") from error
        return self._read(answer)

    def _explain(self, error: Exception) -> str:
        client, tries = self._client, f"{self._client.max_retries + 1} tries"
        if isinstance(error, self._openai.APITimeoutError):
            return (
                f"gave no answer within {client.timeout:g} s in {tries}; raise timeout, or lower parallel or "
                "max_new_tokens."
            )
        if isinstance(error, self._openai.APIConnectionError):
            return f"cannot be reached ({error.__cause__ or error}) in {tries}; start it, or correct base_url."
        if not isinstance(error, self._openai.APIStatusError):
            return f"{_NO_ANSWER} no JSON ({error})."  # although it said so: a ValueError
        status = error.status_code
        if status in (401, 403):  # some servers quote the key, so the answer is not quoted
            return f"refuses the API key (status {status}); set the variable that api_key_env names to a valid key."
        said = " ".join(error.response.text.split())[:300]
        if status == 404:
            return f"knows no model {self.model!r}, or no such path (404: {said}); check model, base_url and chat."
        if status in (408, 409, 429) or status >= 500:
            return f"still answers {status} after {tries} ({said}); lower parallel, or run it again later."
        return f"refuses the request ({status}: {said}); check model, sampling and extra."

    def _read(self, answer: Any) -> Continuation:
        where = f"The server at {self.base_url}"
        if isinstance(answer, str):
            raise RecipeError(f"{where} {_NO_ANSWER} no JSON but {answer[:100]!r}.")
        choices = getattr(answer, "choices", None)
        if not choices:
            raise RecipeError(f"{where} {_NO_ANSWER} JSON without choices: {str(answer)[:200]}.")
        choice = choices[0]
        place = getattr(choice, "message", None) if self.chat else choice
        text = getattr(place, "content" if self.chat else "text", None)
        if not isinstance(text, str):
            raise RecipeError(f"{where} {_NO_ANSWER} a choice without text: {str(choice)[:200]}.")
        counted = getattr(getattr(answer, "usage", None), "completion_tokens", None)
        return Continuation(text, counted if isinstance(counted, int) else len(text.split()))
