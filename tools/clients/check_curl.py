"""curl with TLS and a key, as docs/api.md shows it."""

from __future__ import annotations

import json

from checking import API_KEY, BASE_URL, CA, MODEL, QUESTION, ROOT_URL, check, command, run


def curl(*words: str) -> str:
    return command("curl", "-sS", "--cacert", CA, "-H", f"Authorization: Bearer {API_KEY}", *words)


def post(route: str, body: object, *words: str) -> str:
    kind = ("-H", "Content-Type: application/json")
    return curl(*kind, "-d", json.dumps(body), *words, f"{BASE_URL}/{route}")


@check
def models() -> None:
    """models, health"""
    assert json.loads(curl(f"{BASE_URL}/models"))["data"][0]["id"] == MODEL
    assert command("curl", "-sS", "--fail", "--cacert", CA, f"{ROOT_URL}/health") is not None


@check
def chat() -> None:
    """chat, whole and streamed"""
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    whole = json.loads(post("chat/completions", asked))["choices"][0]["message"]["content"]
    lines = post("chat/completions", asked | {"stream": True}, "-N").split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == whole


@check
def compressed() -> None:
    """HTTP/1.0, a compressed answer asked for"""
    assert json.loads(curl("--http1.0", f"{BASE_URL}/models"))
    assert json.loads(curl("--compressed", f"{BASE_URL}/models"))


@check
def refused() -> None:
    """refused without a key, and without TLS"""
    status = ("-o", "/dev/null", "-w", "%{http_code}")
    assert command("curl", "-sS", "--cacert", CA, *status, f"{BASE_URL}/models") == "401"
    plain = BASE_URL.replace("https:", "http:") + "/models"
    try:
        said = command("curl", "-sS", plain)
    except RuntimeError:
        return
    raise AssertionError(f"plain HTTP was answered: {said}")


if __name__ == "__main__":
    run()
