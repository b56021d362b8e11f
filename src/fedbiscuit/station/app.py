"""The station's page: what a browser asks, and what it gets. Every answer is a whole page or a redirect to one.

A form works without JavaScript; with it, htmx puts the part of the next page that differs into this one. Nothing is kept
here between two requests: it is all in the store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlencode

import jinja2
from fastapi import FastAPI, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from fedbiscuit.data.visible import visible
from fedbiscuit.rundir.disk import human_bytes
from fedbiscuit.rundir.values import dump_json
from fedbiscuit.station import exchange, looking, shown, writing
from fedbiscuit.station.safety import MAX_IMPORT, MAX_PROMPTS, Guard
from fedbiscuit.station.station import Station
from fedbiscuit.types import ConfigError, DataError, FedbiscuitError

__all__ = ["create_app"]

HERE = Path(__file__).parent
STATIC = {
    "station.css": "text/css; charset=utf-8",
    "station.js": "text/javascript; charset=utf-8",
    "htmx.min.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
EXPORTS: dict[str, exchange.Form] = {f"{form}.jsonl": form for form in get_args(exchange.Form)}
LIMITS = {"/import": MAX_IMPORT, "/ask/file": MAX_IMPORT, "/ask": MAX_PROMPTS}
PER_PAGE = 50

Picked = Literal["first", "second", "tie", "skip"]
Field = Annotated[str, Form(max_length=8000)]
Flag = Annotated[bool, Form()]


def create_app(
    station: Station, token: str, hosts: Sequence[str], cookie: str = "fedbiscuit_station", once: str = ""
) -> Guard:
    """The page of a station as an ASGI application behind its guard, which has the other arguments (``safety.py``)."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    render = _renderer(station)
    _add_comparing(app, station, render)
    _add_asking(app, station, render)
    _add_looking(app, station, render)
    _add_keeping(app, station, render)
    files = {name: (HERE / "static" / name).read_bytes() for name in STATIC}

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], media_type=STATIC[name])

    def trouble(status: int, text: str) -> HTMLResponse:
        return render("trouble.html", status, title="This did not work", text=text)

    @app.exception_handler(FedbiscuitError)
    def refused(_: Request, error: FedbiscuitError) -> HTMLResponse:
        return trouble(400 if isinstance(error, DataError | ConfigError) else 500, str(error))

    @app.exception_handler(RequestValidationError)
    def no_such_form(_: Request, error: RequestValidationError) -> HTMLResponse:
        names = ", ".join(str(one["loc"][-1]) for one in error.errors())
        return trouble(422, f"The form came without or with a wrong {names}. Load the page again.")

    @app.exception_handler(HTTPException)
    def no_such_page(_: Request, error: HTTPException) -> HTMLResponse:
        return trouble(error.status_code, "There is no such page." if error.status_code == 404 else str(error.detail))

    @app.exception_handler(Exception)
    def broken(_: Request, error: Exception) -> HTMLResponse:
        return trouble(
            500,
            f"A mistake of the station ({type(error).__name__}). What you answered is kept; its terminal says more.",
        )

    return Guard(app, token, hosts, cookie, LIMITS, once)


Renderer = Callable[..., HTMLResponse]


def _renderer(station: Station) -> Renderer:
    """Fills a template; what every page needs is added here."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "shown": shown.shown,
        "percent": shown.percent,
        "size": human_bytes,
        "count": shown.count,
        "visible": visible,
    }
    env.globals |= {"person": station.person, "folder": str(station.store.folder), "writes": station.writer is not None}

    def render(template: str, status: int = 200, said: str = "", **values: Any) -> HTMLResponse:
        problem = station.problem()
        page = env.get_template(template).render(problem=problem, said=shown.SAID.get(said, ""), **values)
        return HTMLResponse(page, status)

    return render


def _to(path: str, said: str = "", **query: str) -> RedirectResponse:
    """On to a page, with what it shall say."""
    values = {**query, **({"said": said} if said else {})}
    return RedirectResponse(f"{path}?{urlencode(values)}" if values else path, 303)


# Comparing


def _add_comparing(app: FastAPI, station: Station, render: Renderer) -> None:
    def compare(said: str, blind: bool) -> HTMLResponse:
        pair, progress, writer = station.present(blind), station.progress(blind), station.writing()
        return render(
            "compare.html",
            said=said,
            blind=blind,
            pair=pair,
            prompt=pair.pair.prompt if pair else "",
            progress=progress,
            left=shown.time_left(progress.minutes_left) if progress.left else "",
            state=shown.state_of(pair, progress, writer),
            writer=writer,
            line=shown.writing_line(writer) if writer else "",
        )

    @app.get("/")
    def usual(said: str = "") -> HTMLResponse:
        return compare(said, False)

    @app.get("/blind")
    def blind(said: str = "") -> HTMLResponse:
        return compare(said, True)

    @app.get("/waiting")
    def waiting(blind: bool = False) -> Response:
        """Asked every second by a page without a pair: the next page as soon as there is something else to show."""
        found, writer = station.present(blind), station.writing()
        state = shown.state_of(found, station.progress(blind), writer)
        if state != "writing" or writer is None:
            page = compare("", blind)
            page.headers.update({"HX-Retarget": "#stage", "HX-Reselect": "#stage", "HX-Reswap": "outerHTML"})
            return page
        return render("line.html", line=shown.writing_line(writer))

    @app.post("/judge")
    def judge(
        token: Field,
        picked: Annotated[Picked, Form()],
        blind: Flag = False,
        flag: Flag = False,
        reason: Field = "",
        seconds: Field = "",
    ) -> Response:
        page, took = _page(blind), _seconds(seconds)
        with station.store.all_or_nothing():  # of two clicks at once, the one that is told "kept" is the one that is
            try:
                open_now = station.store.presentation(token)
            except DataError:
                return _to(page, "gone")
            if open_now.person != station.person:
                return _to(page, "gone")
            known = station.store.is_answered(token)
            if flag and not known:
                station.flag(token, reason)
            if picked == "skip":
                station.skip(token, took, reason)
            else:
                station.judge(token, {"first": 0, "second": 1, "tie": None}[picked], took, reason)
        return _to(page, "already" if known else picked)

    @app.post("/undo")
    def undo(last: Field = "", blind: Flag = False) -> Response:
        back = station.undo(last) if last else None
        return _to(_page(blind), "undo" if back else "nothing")

    @app.post("/retry")
    def retry(blind: Flag = False) -> Response:
        if station.writer is not None:
            station.writer.retry()
        return _to(_page(blind), "retry")

    @app.get("/help")
    def help_() -> HTMLResponse:
        return render("help.html")


def _page(blind: bool) -> str:
    return "/blind" if blind else "/"


def _seconds(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# Asking


def _add_asking(app: FastAPI, station: Station, render: Renderer) -> None:
    def page(said: str = "", error: str = "", text: str = "", added: int = -1) -> HTMLResponse:
        prompts = station.store.prompts()
        return render(
            "ask.html",
            400 if error else 200,
            said=said,
            prompts=prompts[::-1][:200],
            num=len(prompts),
            writer=station.writing(),
            error=error,
            text=text,
            added=added,
        )

    @app.get("/ask")
    def ask(said: str = "", added: Annotated[int, Query(ge=-1, le=10**9)] = -1) -> HTMLResponse:
        return page(said, added=added)

    @app.post("/ask")
    def add(
        prompts: Annotated[
            str, Form(max_length=200_000)
        ] = "",  # 100,000 in the field, where the end of a line is one character
        whole: Flag = False,
        blind: Flag = False,
    ) -> Response:
        text = prompts.replace("\r\n", "\n")
        texts = [one for one in ([text] if whole else text.split("\n")) if one.strip()]
        if not texts:
            return page(error="There is no prompt in it.")
        try:
            return _to("/ask", added=str(station.ask(texts, blind)))
        except DataError as error:
            return page(error=str(error), text=text.replace("\x00", ""))

    @app.post("/forget/prompt")
    def forget_prompt(prompt: Annotated[int, Form()]) -> Response:
        station.forget_prompt(prompt)
        return _to("/ask", "forgot-prompt")

    @app.post("/ask/file")
    def add_file(file: UploadFile, blind: Flag = False) -> Response:
        try:
            added, _ = _from_upload(station, file, lambda path: station.import_prompts(path, blind))
        except DataError as error:
            return page(error=str(error))
        return _to("/ask", added=str(added))


def _from_upload(station: Station, upload: UploadFile, take: Callable[[Path], Any]) -> Any:
    """Give an uploaded file to a function that reads files. Its name is only a word in messages, never a path."""
    named = (upload.filename or "file").replace("\\", "/").rsplit("/", 1)[-1]
    ending = ".txt" if named.lower().endswith(".txt") else ".jsonl"
    with tempfile.TemporaryDirectory(dir=station.store.folder, prefix=".upload-") as folder:
        path = Path(folder) / f"upload{ending}"
        path.write_bytes(upload.file.read())
        try:
            return take(path)
        except DataError as error:
            raise DataError(str(error).replace(str(path), named[:80])) from None


# Looking


def _add_looking(app: FastAPI, station: Station, render: Renderer) -> None:
    @app.get("/me")
    def me() -> HTMLResponse:
        found, missing = None, ""
        try:
            if station.run is not None:
                found = looking.what_was_learned(station.run, station.person)
            if station.site is not None and not (found and found.rounds):
                found = looking.what_the_site_saw(station.site, station.person) or found
        except FedbiscuitError as error:
            missing = str(error)
        steady, progress = station.consistency(), station.progress()
        return render(
            "me.html",
            progress=progress,
            steady=steady,
            same=shown.share(steady.same, steady.repeats),
            first=shown.share(steady.first, steady.choices),
            learned=found,
            missing=missing,
            curve=shown.curve(found.rounds) if found else None,
            blind=writing.blind_result(station.store, station.person),
            blind_left=station.progress(blind=True).left,
        )

    @app.get("/left")
    def left() -> HTMLResponse:
        return render("left.html", left=looking.what_left(station.site), site=station.site)


# Keeping


def _add_keeping(app: FastAPI, station: Station, render: Renderer) -> None:
    def page(
        said: str = "", error: str = "", start: int = 0, imported: exchange.Imported | None = None
    ) -> HTMLResponse:
        found, num = shown.lines(station.store, station.person, start, PER_PAGE)
        return render(
            "data.html",
            400 if error else 200,
            said=said,
            error=error,
            lines=found,
            num=num,
            start=start,
            per_page=PER_PAGE,
            imported=imported,
        )

    @app.get("/data")
    def data(said: str = "", start: Annotated[int, Query(ge=0, le=10**9)] = 0) -> HTMLResponse:
        return page(said, start=start)

    @app.get("/export/{name}")
    def export(name: str) -> Response:
        form = EXPORTS.get(name)
        if form is None:
            raise HTTPException(404)
        lines = [dump_json(record) + "\n" for record in exchange.records(station.store, form, station.person)]
        if not lines:
            return _to("/data", "no-lines")
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response("".join(lines), media_type="application/jsonl", headers=headers)

    @app.post("/import")
    def import_(file: UploadFile) -> Response:
        try:
            found = _from_upload(station, file, station.import_file)
        except DataError as error:
            return page(error=str(error))
        return page(imported=found)

    @app.post("/forget/pair")
    def forget_pair(pair: Field) -> Response:
        try:
            station.forget_pair(pair)
        except DataError:
            return _to("/data", "gone")
        return _to("/data", "forgot-pair")

    @app.post("/forget")
    def forget(what: Annotated[Literal["person", "all"], Form()], word: Field = "") -> Response:
        if word.strip().lower() != "forget":
            return page(error="Nothing is removed: the word forget was not typed.")
        if what == "person":
            station.forget_person()
        else:
            station.forget_all()
        return _to("/data", f"forgot-{what}")
