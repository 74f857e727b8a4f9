"""The report's look: one stylesheet, light and dark by the reader's own setting."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #f5f6f8; --card: #ffffff;
  --line: #dde1e7; --good: #3a9d6c; --warn: #d9822b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b2; --paper: #14171c;
  --card: #1d2128; --line: #323944; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 2px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0 0 8px; }
p { margin: 0 0 10px; max-width: 76ch; }
.soft, figcaption { color: var(--soft); font-size: 13px; }
.mono, code { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin: 0 0 14px; }
.row { display: flex; flex-wrap: wrap; gap: 14px; align-items: stretch; }
.row > .card { margin: 0; flex: 1 1 260px; min-width: 0; }
.row > .wide { flex-basis: 420px; }
.last { margin-bottom: 14px; }
table + p { margin-top: 10px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px;
  margin: 18px 0; }
.figures .card { margin: 0; padding: 12px 16px; }
.figures b { display: block; font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { margin-top: 8px; }
svg { width: 100%; max-width: 620px; height: auto; display: block; color: var(--ink); margin-top: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
td.mono { overflow-wrap: break-word; vertical-align: top; }
td.cell { text-align: center; padding: 5px 12px; border: 2px solid var(--card); border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(108px, 1fr)); gap: 10px;
  margin-top: 10px; }
.sheet img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px; display: block;
  background: var(--line); }
.sheet figcaption { font-size: 12px; line-height: 1.35; margin-top: 4px; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; }
.sheet figure { min-width: 0; }
.sheet b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.pixelated { image-rendering: pixelated; }
.montage { max-width: 100%; border-radius: 6px; display: block; }
.scroll { overflow-x: auto; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 12px;
  align-items: center; font-size: 14px; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 12px; min-width: 2px; border-radius: 3px; background: var(--warn); }
.bars i.good { background: var(--good); }
"""
