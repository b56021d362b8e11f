"""Colours and layout of the page. Light and dark follow the reader's system; every pair of colours meets WCAG AA."""

from __future__ import annotations

__all__ = ["DARK", "GROUPS", "LIGHT", "stylesheet"]

LIGHT = {
    "ink": "#1c2430",
    "muted": "#566070",
    "grid": "#dfe3e9",
    "paper": "#f5f6f8",
    "card": "#ffffff",
    "shade": "#e9ecf1",
    "link": "#1f5fa8",
    "main": "#0b7080",
    "g0": "#1f66b5",
    "g1": "#c2500f",
    "g2": "#8a45b0",
    "g3": "#2d8034",
    "g4": "#a86f00",
    "g5": "#c2316b",
    "g6": "#5b6b78",
    "g7": "#5a62c9",
}
DARK = {
    "ink": "#e6eaf0",
    "muted": "#a3adbb",
    "grid": "#343c48",
    "paper": "#12161c",
    "card": "#1a2028",
    "shade": "#272e39",
    "link": "#84b8f4",
    "main": "#5fc9d6",
    "g0": "#6fb1f5",
    "g1": "#f5935a",
    "g2": "#c99af0",
    "g3": "#7fd184",
    "g4": "#e3b34a",
    "g5": "#f587b0",
    "g6": "#b4c2cf",
    "g7": "#a6adfa",
}
GROUPS = tuple(name for name in LIGHT if name[0] == "g" and name[1:].isdigit())
"""The colours of the adapters, in their order."""

LAYOUT = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
  -webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:2rem;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.35rem;line-height:1.3;margin:48px 0 12px}
h3{font-size:1.02rem;line-height:1.35;margin:0 0 6px}
p{margin:0 0 12px;max-width:75ch}
a{color:var(--link)}
.kind{color:var(--muted);margin:0 0 4px}
.lead{font-size:1.18rem;line-height:1.5;margin:14px 0 8px;max-width:68ch}
.note,figcaption,.small{color:var(--muted);font-size:.93rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:26px 0 0;padding:0;
  list-style:none}
.tiles li,.card,figure{background:var(--card);border:1px solid var(--grid);border-radius:10px}
.tiles li{padding:14px 18px}
.tiles b{display:block;font-size:1.75rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.tiles span{color:var(--muted);font-size:.93rem;line-height:1.35;display:block}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--grid);border-radius:10px;margin:0 0 10px}
.scroll:focus-visible,summary:focus-visible{outline:3px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:9px 16px;text-align:right;vertical-align:top;border-top:1px solid var(--grid)}
thead th{border-top:0;color:var(--muted);font-weight:600;font-size:.88rem;vertical-align:bottom;line-height:1.3}
th:first-child,td:first-child,.left{text-align:left}
tbody th{font-weight:400}
tbody tr.main th,tbody tr.main td{font-weight:650}
tbody th.code,td.code{overflow-wrap:anywhere;min-width:9em}
td small{color:var(--muted);font-size:.85em;font-weight:400;white-space:nowrap}
.figures{columns:2 420px;column-gap:18px}
figure{margin:0 0 18px;padding:16px 18px 14px;break-inside:avoid}
figure svg{display:block;width:100%;height:auto;max-width:540px;margin:0 auto}
figure svg *{stroke-linejoin:round}
figcaption{margin-top:8px}
.card{padding:16px 18px;margin:0 0 14px}
.prompt{font-weight:600;margin:0 0 12px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-width:none}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:22px}
.pair h4{font-size:.88rem;margin:0 0 4px;color:var(--muted);font-weight:600}
.pair .text{margin:0}
.pair>div{min-width:0;border-left:3px solid var(--grid);padding-left:14px}
.pair>div.aligned{border-left-color:var(--main)}
details{background:var(--card);border:1px solid var(--grid);border-radius:10px;margin:0 0 12px}
summary{padding:12px 18px;cursor:pointer;font-weight:600}
details pre{margin:0;padding:4px 18px 16px;overflow-x:auto;font-size:.86rem;line-height:1.5}
details .scroll{border:0;border-radius:0 0 10px 10px;margin:0}
pre,code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
footer{margin-top:44px;color:var(--muted);font-size:.9rem}
@media (max-width:640px){
  main{padding:24px 14px 48px}
  h1{font-size:1.6rem}
  .lead{font-size:1.08rem}
  .tiles{grid-template-columns:1fr 1fr;gap:10px}
  .tiles li{padding:12px 14px}
  .tiles b{font-size:1.4rem}
  th,td{padding:8px 11px}
  td{white-space:nowrap}
  td.left{white-space:normal;min-width:8em}
  td small{display:block}
  tbody th:first-child{position:sticky;left:0;background:var(--card);max-width:42vw}
  figure{padding:14px 12px 12px}
  .pair{grid-template-columns:1fr;gap:16px}
}
@media print{body{background:none}main{max-width:none;padding:0}figure,.card,tr{break-inside:avoid}}
"""


def stylesheet() -> str:
    """The whole CSS of the page."""
    light, dark = (";".join(f"--{name}:{value}" for name, value in colours.items()) for colours in (LIGHT, DARK))
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{LAYOUT}"
    )
