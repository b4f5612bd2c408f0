"""Every error the engine raises, and who is at fault.

EngineError
├── RequestError            the caller: 4xx, other requests never notice
│   ├── PromptTooLong       prompt + max_tokens do not fit the context
│   ├── BadPrompt           empty prompt, token ids outside the vocabulary
│   ├── BadSampling         a sampling parameter out of its range
│   ├── BadGrammar          a schema, regex or grammar that cannot be read, followed or met
│   ├── BadAdapter          a LoRA adapter that cannot be read, or not on this model, or not under this name
│   └── UnknownAdapter      no adapter of that name is loaded (404)
├── ModelError              the operator: the model cannot be served, nothing starts
│   ├── UnsupportedModel    not a Gemma 2 or Gemma 3 text checkpoint, or an unsafe dtype
│   ├── BadCheckpoint       files missing, truncated, or not matching the configuration
│   └── ModelNotFound       neither a directory nor a repository we may read (gated, 401, 404)
├── ConfigError             the operator: settings that cannot hold together
├── ComputeError            us: one request's logits are not finite (500)
├── Overloaded              nobody: retry later (429 or 503)
├── Aborted                 the caller: it was ended by `abort`
└── EngineDead              us: the engine process died, hung or is shutting down (500, restart)

A message has three parts: what must hold, what was given, what to do. None carries prompt or completion text.
"""


class EngineError(Exception):
    """Root of all errors of the engine."""


class RequestError(EngineError):
    """One request is wrong; it is refused and nothing else is lost. `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """Prompt and requested output do not fit the context."""


class BadPrompt(RequestError):
    """The prompt is empty, or has token ids outside the vocabulary."""


class BadSampling(RequestError):
    """A sampling parameter is out of its range."""


class BadGrammar(RequestError):
    """A schema, regular expression or grammar cannot be read, is too large to follow, or allows no text."""


class BadAdapter(RequestError):
    """A LoRA adapter is unreadable, unsupported or of another model, or its name is taken."""


class UnknownAdapter(RequestError):
    """No adapter of that name is loaded."""


class ModelError(EngineError):
    """The model cannot be served."""


class UnsupportedModel(ModelError):
    """The configuration is not one of the models (or dtypes) that Cabochon runs."""


class BadCheckpoint(ModelError):
    """Weights are missing, truncated, or do not match the configuration."""


class ModelNotFound(ModelError):
    """No such directory, and no repository of that name that we may read."""


class ConfigError(EngineError):
    """Settings that cannot hold together."""


class ComputeError(EngineError):
    """The model gave NaN for one request: it ends, the others go on."""


class Overloaded(EngineError):
    """Too much is waiting. `retry_after_s` is the predicted wait."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Aborted(EngineError):
    """The request was ended by `abort` while somebody still read its outputs."""


class EngineDead(EngineError):
    """The engine process is gone, hangs, or is shutting down; its open requests end with this."""
