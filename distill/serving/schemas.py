"""What the service is asked and what it answers. FastAPI makes ``/openapi.json`` of these types."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_K = 100
MAX_TEXT = 2000  # characters; a tower reads far less
MAX_TEXTS = 256
MAX_PICTURES = 32
BODY_BYTES = 20 << 20

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT)]
Find = Literal["images", "texts"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SearchOptions(_Strict):
    """How to answer."""

    k: int = Field(10, ge=1, le=MAX_K, description="how many hits")
    rerank: bool = Field(False, description="let the teacher read the query with the first hits and order them anew")
    find: Find | None = Field(
        None, description="what to look for; pictures for a sentence and captions for a picture where absent"
    )


class SearchRequest(SearchOptions):
    """A sentence to search with."""

    text: Text


class Hit(BaseModel):
    """One item found."""

    kind: Find
    id: int = Field(description="row of the corpus")
    score: float = Field(description="cosine of the student's vectors")
    teacher_score: float | None = Field(description="raw score of the teacher; null where it was not asked")
    rank: int = Field(description="place in this answer, from 1")
    rank_before: int = Field(description="place before re-ranking, from 1")
    name: str | None = Field(description="of a picture")
    text: str | None = Field(description="of a caption")
    picture: int | None = Field(description="id for /picture/{id}; for a caption that of its first labelled picture")
    captions: list[str] = Field(description="labelled captions of a picture, at most five")


class Milliseconds(BaseModel):
    """Time of each part; waiting for other requests is not in it."""

    preprocess: float = 0.0
    embed: float = 0.0
    search: float = 0.0
    rerank: float | None = None
    total: float = 0.0


class Searched(BaseModel):
    """What was searched."""

    find: Find
    items: int
    exact: bool = Field(description="every item was compared")
    corpus: str
    split: str
    reranked: int = Field(description="hits that the teacher read")


class SearchAnswer(BaseModel):
    """Hits, best first."""

    hits: list[Hit]
    milliseconds: Milliseconds
    searched: Searched


class EmbedRequest(_Strict):
    """Sentences to embed."""

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class EmbedAnswer(BaseModel):
    """Unit vectors in the order of what was sent."""

    dim: int
    kind: Find
    embeddings: list[list[float]]
    milliseconds: Milliseconds


class Health(BaseModel):
    """The service answers only once everything is loaded."""

    status: Literal["ready"] = "ready"


class StudentInfo(BaseModel):
    """The student that answers."""

    identity: str
    class_: str = Field(serialization_alias="class")
    dim: int
    run: str
    arm: str
    precision: dict[str, str] = Field(description="of each tower")


class TeacherInfo(BaseModel):
    """The teacher that re-ranks."""

    identity: str
    score_kind: str
    rerank: int = Field(description="hits that it reads")


class Limits(BaseModel):
    """What a request may hold."""

    body_bytes: int = BODY_BYTES
    text_characters: int = MAX_TEXT
    texts: int = MAX_TEXTS
    pictures: int = MAX_PICTURES
    k: int = MAX_K


class Info(BaseModel):
    """What this service is."""

    version: str
    student: StudentInfo
    teacher: TeacherInfo | None
    corpus: str
    split: str
    items: dict[Find, int] | None = Field(description="null: exported without an index")
    pictures: bool = Field(description="whether /picture/{id} has pictures")
    limits: Limits = Limits()


class Problem(BaseModel):
    """Why a request was not answered."""

    error: str
