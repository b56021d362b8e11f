"""The preference station: where a person's comparisons come from, and stay.

What a page needs, all of it without a web server:

    store = Store.open(folder)                                   # store.py: one SQLite file; history is append-only
    station = Station(store, person, Asking(), authors_of(model, policy))   # station.py: what the page calls
    shown = station.present()                                    # queue.py: Presentation(token, first, second, ...) or None
    station.judge(shown.token, 0 | 1 | None, seconds, reason)    # 0: the answer shown first; the same token twice is one answer
    station.skip(token)  station.flag(token, reason)  station.undo(station.progress().last)
    station.progress()  station.consistency()  station.writing() # counts, minutes left; consistency, position bias; the writer
    station.ask(["a prompt", ...])                               # writing.py: answers come in the background
    station.present(blind=True)  blind_result(store, person)     # raw against aligned policy
    what_was_learned(run, client)  what_left(site)               # looking.py
    export(store, path, form)  import_file(...)  refresh(store)  # exchange.py: JSON lines in and out
    station.forget_pair(id)  station.forget_person()  station.forget_all()

Errors are those of ``types.py``: an unknown token or pair is a ``DataError``, a full or broken disk an ``EnvironmentFault``.
Texts come as people and models wrote them; whoever shows them escapes them (``data.jsonlines.shown`` for a terminal).
"""
