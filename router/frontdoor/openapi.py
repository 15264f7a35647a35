"""/openapi.json: the HTTP front door described, made from the structs that read its bodies."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import msgspec

from crossdock.router.frontdoor import openapi_answers as answers
from crossdock.router.frontdoor.openai_schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ResponseBody,
    TokenizeBody,
)
from crossdock.router.frontdoor.openapi_bodies import BODIES, describe

_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "maxLength": 256, "pattern": "^[!-~]+$"},
    "description": "Comes back with the answer, and is the end of its id.",
}


@functools.cache
def document() -> dict[str, Any]:
    """The description, in OpenAPI 3.1."""
    kinds = (*BODIES, *answers.ANSWERS)
    _, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    describe(components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Crossdock", "version": metadata.version("crossdock")},
        "paths": {
            "/v1/chat/completions": {
                "post": _asking("Continues a chat.", ChatBody, answers.ChatCompletion, stream=True)
            },
            "/v1/completions": {
                "post": _asking("Continues texts.", CompletionBody, answers.Completion, stream=True)
            },
            "/v1/responses": {
                "post": _asking(
                    "Answers, and keeps the conversation.",
                    ResponseBody,
                    answers.Response,
                    stream=True,
                )
            },
            "/v1/responses/{id}": {
                "get": _getting("A response that is kept.", answers.Response),
                "delete": _getting("Forgets a response.", answers.ResponseDeleted),
                "parameters": [_ID],
            },
            "/v1/responses/{id}/input_items": {
                "get": _getting("What its request brought.", answers.ResponseItems),
                "parameters": [_ID],
            },
            "/v1/models": {"get": _getting("What is served.", answers.Models)},
            "/v1/models/{id}": {
                "get": _getting("One model.", answers.Model),
                "parameters": [_ID],
            },
            "/tokenize": {"post": _asking("Token ids of a text.", TokenizeBody, answers.Tokens)},
            "/detokenize": {"post": _asking("Text of token ids.", DetokenizeBody, answers.Text)},
            "/health": {"get": _getting("Whether requests can be served.", answers.Health, 503)},
            "/ping": {"get": _getting("The same.", answers.Health, 503)},
            "/version": {"get": _getting("The version of the server.", answers.Version)},
            "/metrics": {
                "get": {
                    "summary": "Figures, as Prometheus reads them.",
                    "responses": {
                        "200": {"description": "all is well", "content": {"text/plain": {}}},
                        "default": _refused(),
                    },
                }
            },
            "/openapi.json": {
                "get": {
                    "summary": "This description.",
                    "responses": {
                        "200": {"description": "all is well", "content": {"application/json": {}}}
                    },
                }
            },
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _asking(summary: str, body: type, answer: type, stream: bool = False) -> Mapping[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
    if stream:
        content["text/event-stream"] = {}
    return {
        "summary": summary,
        "parameters": [_REQUEST_ID],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(body)}},
        },
        "responses": {
            "200": {"description": "all is well", "content": content},
            "default": _refused(),
        },
    }


def _getting(summary: str, answer: type, other: int | None = None) -> Mapping[str, Any]:
    good = {"description": "all is well", "content": _json(answer)}
    responses = {"200": good, "default": _refused()}
    if other is not None:
        responses[str(other)] = {"description": "not now", "content": _json(answer)}
    return {"summary": summary, "responses": responses}


def _refused() -> dict[str, Any]:
    return {"description": "refused, or failed", "content": _json(answers.ErrorAnswer)}


def _json(kind: type) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(kind)}}


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
