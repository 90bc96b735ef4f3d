"""What is asked for by schema. All of it has an end: a small model may go on for ever with a text or with white space."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

QUESTION = "What is the weather in Paris?"
HISTORY = [("user", "What is the weather in Paris?"), ("assistant", "Sunny."), ("user", "And in Rome?")]

# `x-guidance` at the top of a schema: no white space between the parts of the JSON.
COMPACT = {"x-guidance": {"whitespace_flexible": False}}


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=COMPACT)
    city: str = Field(max_length=12)
    degrees: int = Field(ge=-60, le=60)
    sky: Literal["clear", "cloudy"]


class Song(BaseModel):
    """Play a song."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=COMPACT)
    loud: bool


class Songs(BaseModel):
    """Songs to play."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=COMPACT)
    tasks: list[Song] = Field(min_length=1, max_length=3)


class Defaults(BaseModel):
    """What `{}` is too."""

    loud: bool = True


def function(shape: type[BaseModel]) -> dict:
    """A tool of OpenAI's chats."""
    told = {"name": shape.__name__, "description": shape.__doc__, "parameters": shape.model_json_schema()}
    return {"type": "function", "function": told}


def schema_format(shape: type[BaseModel]) -> dict:
    """A `response_format`."""
    return {"type": "json_schema", "json_schema": {"name": shape.__name__, "schema": shape.model_json_schema()}}
