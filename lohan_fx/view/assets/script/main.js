// The page, put together; what it took is in performance marks.

const parts = [
  ...header(),
  model.differences ? comparison.build() : null,
  model.measured ? agreement.build() : null,
  lanes.build(),
  memory.build(),
  stages.build(),
  table.build(),
  make(
    "footer",
    {},
    "Made by lohan_fx.view. This page holds all it shows and asks the network for nothing. Charts of memory are drawn with uPlot (MIT licence, \u00a9 2022 Leon Sorokin).",
  ),
].filter(Boolean);
document.getElementById("page").append(...parts);
document.body.append(detail.build(), tip.node, voice);
memory.start();
document.addEventListener("keydown", (event) => event.key === "Escape" && tip.hide());
document.addEventListener("scroll", () => tip.hide(), { passive: true });
requestAnimationFrame(() => performance.mark("interactive"));
