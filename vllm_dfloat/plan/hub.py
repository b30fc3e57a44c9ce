"""Find a model's config.json: in a folder, as a file, or by an id of the Hugging Face hub."""

from pathlib import Path

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, is_dfloat11
from vllm_dfloat.checkpoint.hub import is_of_hub, why_refused
from vllm_dfloat.checkpoint.locate import check_config
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.errors import FormatError, UnsupportedError

TIMEOUT = 10  # seconds; huggingface_hub would try for half a minute where there is no network
ADVICE = f"give a model's folder or its {CONFIG_FILE}."


def config_file(model: str) -> Path:
    """Return the config.json in a folder, the file itself, or that of a hub id (from the cache or the hub).

    Nothing else is fetched. HF_HUB_CACHE or HF_HOME tell the cache, as for all users of huggingface_hub.

    Raises:
        FormatError: there is none.
        UnsupportedError: a hub id, and huggingface_hub is not installed.
    """
    path = Path(model)
    if path.exists():
        check_config(path)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            if is_dfloat11(path):
                open_checkpoint(path)  # raises: says what an unfinished one needs
            raise FormatError(
                f"{model}: no {CONFIG_FILE} in it; expected a model's folder, its {CONFIG_FILE}, or a hub id."
            )
        return path / CONFIG_FILE
    if not is_of_hub(model):
        raise FormatError(
            f"{model}: no such file or folder; expected a model's folder, its {CONFIG_FILE}, or a hub id, "
            "such as meta-llama/Llama-3.1-405B."
        )
    return _of_hub(model)


def _of_hub(model: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise UnsupportedError(
            f"{model}: no such folder, and huggingface_hub, which would fetch its {CONFIG_FILE}, cannot be imported "
            f"({error}). Run pip install huggingface_hub, or give a model's folder or its {CONFIG_FILE}."
        ) from error

    cached = huggingface_hub.try_to_load_from_cache(model, CONFIG_FILE)
    if isinstance(cached, str):
        return Path(cached)
    where = f"{model}: no such folder, and no {CONFIG_FILE} of it in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise FormatError(f"{where}; HF_HUB_OFFLINE forbids fetching it. Unset that, or {ADVICE}")
    try:
        # Asked once, with a short time limit: hf_hub_download tries six times, with a warning each.
        url = huggingface_hub.hf_hub_url(model, CONFIG_FILE, endpoint=constants.ENDPOINT)
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
        return Path(huggingface_hub.hf_hub_download(model, CONFIG_FILE))
    except Exception as error:  # network, rights, names: a dozen kinds
        raise FormatError(f"{where}; {_reason(error, model, constants.ENDPOINT)}") from error


def _reason(error: Exception, model: str, endpoint: str) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.EntryNotFoundError):
        return f"the model has no {CONFIG_FILE} on {endpoint} either; {ADVICE}"
    return why_refused(error, model, endpoint, ADVICE)
