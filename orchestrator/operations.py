"""What a model is for, and what is said to a request that another is for."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.domain import EncodeRequest, Model
from orchestrator.errors import InvalidRequest, Text, TruthGPTError, UpstreamUnavailable

SHOWN = 10  # models in a sentence
_DOES = {
    "generate": Text("generate text", "genera texto"),
    "embed": Text("make embeddings", "calcula embeddings"),
    "classify": Text("classify text", "clasifica textos"),
}
_IS_FOR = {
    "generate": Text("it generates text", "genera texto"),
    "embed": Text("it makes embeddings", "calcula embeddings"),
    "classify": Text("it classifies text", "clasifica textos"),
    "infer": Text("use infer", "use infer"),
}


def mismatch(model: Model, operation: str, models: Iterable[Model]) -> TruthGPTError:
    """Why a model is not asked for what it does not do: InvalidRequest that says which of `models` do it, or
    UpstreamUnavailable while nobody has read what it does.
    """
    if not model.seen:
        return UpstreamUnavailable(f"what {model.name} does is not known yet")
    names = sorted(other.name for other in models if other.operation == operation)
    shown = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
    does, own = _DOES[operation], _IS_FOR[model.operation]
    return InvalidRequest(
        Text(
            f"The model '{model.name}' does not {does.en}: {own.en}. "
            + (f"Models that do: {shown}." if names else "No model here does."),
            f"El modelo '{model.name}' no {does.es}: {own.es}. "
            + (f"Lo hacen: {shown}." if names else "Ninguno de los modelos de aquí lo hace."),
        ),
        "model",
    )


def fit(model: Model, request: EncodeRequest) -> None:
    """Raises InvalidRequest for more dimensions than the model has."""
    wanted = request.dimensions
    if wanted is None or model.dim is None or wanted <= model.dim:
        return
    raise InvalidRequest(
        Text(
            f"dimensions must be an integer from 1 to {model.dim}, which is all that '{model.name}' has.",
            f"dimensions debe ser un entero de 1 a {model.dim}, que son todas las de '{model.name}'.",
        ),
        "dimensions",
    )
