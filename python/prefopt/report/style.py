"""The page's one style sheet: light and dark, phone and desk, both directions of writing."""

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --soft: #59626d; --page: #f6f7f8; --card: #fff; --rule: #dde1e5;
  --good: #1f7a47; --bad: #b5471c; --unclear: #7a6a14; --own: #2f6fc0; --bar: #6fa3e0; --wash: #eef1f4; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e9ec; --soft: #a3acb6; --page: #14171a; --card: #1c2024; --rule: #343a41;
  --good: #5cc48a; --bad: #f08a5d; --unclear: #d6c25a; --own: #7ab0f2; --bar: #2f62a3; --wash: #262b30; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans Arabic", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; } h3 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
h2 + h3 { margin-top: 0; }
section, header .verdict { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
  padding: 1rem; margin: 1rem 0; }
p { margin: .4rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
[dir=auto] { unicode-bidi: plaintext; text-align: start; overflow-wrap: anywhere; }
.verdict { border-inline-start: .4rem solid var(--tone) !important; font-size: 1.15rem; font-weight: 600; }
.good { --tone: var(--good); } .bad { --tone: var(--bad); } .unclear { --tone: var(--unclear); }
.note { border-inline-start: .25rem solid var(--unclear); padding-inline-start: .7rem; margin: .7rem 0; }
ul { padding-inline-start: 1.2rem; margin: .4rem 0; } li { margin: .25rem 0; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .5rem .8rem; align-items: center; margin: .8rem 0; }
.bar { position: relative; height: 1.5rem; background: var(--wash); border-radius: .3rem; overflow: hidden; }
.bar i { position: absolute; inset-block: 0; left: 0; background: var(--bar); }
.bar b { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--ink); }
.bar b::before, .bar b::after { content: ""; position: absolute; top: -4px; height: 10px; width: 2px;
  background: var(--ink); } .bar b::before { left: 0; } .bar b::after { right: 0; }
.sample { border-top: 1px solid var(--rule); padding: .8rem 0; } .sample:first-of-type { border-top: 0; }
.question { font-weight: 600; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; margin-top: .5rem; }
.answer { background: var(--wash); border-radius: .4rem; padding: .5rem .7rem;
  border-top: 3px solid var(--tone, var(--rule)); }
.label { display: block; font-size: .8rem; color: var(--soft); } .mark { color: var(--tone); font-weight: 600; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: start; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { white-space: nowrap; overflow-wrap: normal !important; } td { min-width: 4rem; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.scores td.text { min-width: 0; white-space: nowrap; }
.scores td.text:last-child { white-space: normal; min-width: 9rem; }
.scores tbody th { white-space: normal; min-width: 9rem; }
.components td.text { min-width: 0; overflow-wrap: break-word; } .components td.text:last-child { min-width: 16rem; }
.wide { max-width: 38rem; }
td.text { min-width: 9rem; max-width: 36rem; } thead th { color: var(--soft); font-weight: 600; }
summary { cursor: pointer; color: var(--own); margin: .5rem 0; }
pre { overflow-x: auto; background: var(--wash); padding: .7rem; border-radius: .4rem; font-size: .85rem; }
@media (max-width: 40rem) { th { white-space: normal; overflow-wrap: anywhere !important; min-width: 7.5rem; }
  thead th { min-width: 0; } td.text { min-width: 6.5rem; } .answers, .plots { grid-template-columns: 1fr; }
  section { padding: .8rem; }
  .stacked thead, .stacked td:empty { display: none; }
  .stacked, .stacked tbody, .stacked tr, .stacked th { display: block; }
  .stacked th { border: 0; padding-bottom: 0; }
  .stacked tr { border-bottom: 1px solid var(--rule); padding-bottom: .3rem; }
  .stacked td, .stacked td.text:last-child { display: grid; grid-template-columns: 8rem 1fr; border: 0;
    padding: .1rem 0; min-width: 0;
    white-space: normal; }
  .stacked td::before { content: attr(data-head); color: var(--soft); }
  .stacked td.text:last-child:empty { display: none; } }
@media print { section { break-inside: avoid; } }
"""
