// SPDX-License-Identifier: Apache-2.0
"use strict";
// Tables: a column head sorts its rows; what has no value stays last.
const said = document.getElementById("said");
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [row.cells[column].dataset.value, row]);
      const numbers = rows.every(([value]) => value === "" || isFinite(value));
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = numbers ? a - b : a.localeCompare(b);
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
      said.textContent = `sorted by ${head.textContent.trim()}, ${up ? "ascending" : "descending"}`;
    });
  });
}

// Figures: the value that is nearest to the pointer, or that the arrow keys have reached.
const tip = document.getElementById("tip");
let near = null;
function hide() {
  tip.hidden = true;
  near?.classList.remove("near");
  near = null;
}
function show(text, x, y, mark) {
  hide();
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.max(8, Math.min(x - tip.offsetWidth / 2, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const above = y - tip.offsetHeight - 12;
  tip.style.left = `${left}px`;
  tip.style.top = `${above < 8 ? y + 16 : above}px`;
  near = mark ?? null;
  near?.classList.add("near");
}
function cellText(grid, row, column) {
  const value = grid.values[row][column];
  return `${grid.row_names[row]}, ${grid.column_name} ${grid.columns?.[column] ?? column}: ${value ?? "none"} ${grid.unit}`;
}
for (const svg of document.querySelectorAll("figure svg")) {
  for (const title of [...svg.querySelectorAll("title")]) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove(); // else the browser shows it as well
  }
  const marks = [...svg.querySelectorAll("[data-tip]")];
  const maps = [...svg.querySelectorAll("[data-grid]")].map((cover) => [cover, JSON.parse(cover.dataset.grid)]);
  if (!marks.length && !maps.length) continue;
  svg.setAttribute("tabindex", "0");
  const middle = (box) => [box.left + box.width / 2, box.top + box.height / 2];

  svg.addEventListener("pointermove", (event) => {
    const { clientX: x, clientY: y } = event;
    for (const [cover, grid] of maps) {
      const box = cover.getBoundingClientRect();
      const rows = grid.values.length;
      const columns = Math.max(...grid.values.map((cells) => cells.length));
      const row = Math.floor(((y - box.top) / box.height) * rows);
      const column = Math.floor(((x - box.left) / box.width) * columns);
      if (row >= 0 && row < rows && column >= 0 && column < columns) return show(cellText(grid, row, column), x, y);
    }
    let [found, least] = [event.target.closest("[data-tip]"), 18];
    if (!found) {
      for (const mark of marks) {
        const [left, top] = middle(mark.getBoundingClientRect());
        const distance = Math.hypot(left - x, top - y);
        if (distance < least) [found, least] = [mark, distance];
      }
    }
    if (found) show(found.dataset.tip, x, y, found);
    else hide();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);

  let place = -1;
  const cells = maps.flatMap(([cover, grid]) =>
    grid.values.flatMap((row, r) => row.map((_, c) => [cover, grid, r, c])));
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: maps[0]?.[1].values[0].length ?? 1, ArrowUp: -(maps[0]?.[1].values[0].length ?? 1) };
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    if (!(event.key in steps)) return;
    event.preventDefault();
    const count = marks.length || cells.length;
    place = place < 0 ? 0 : Math.max(0, Math.min(count - 1, place + steps[event.key]));
    if (marks.length) {
      const mark = marks[place];
      show(mark.dataset.tip, ...middle(mark.getBoundingClientRect()), mark);
    } else {
      const [cover, grid, row, column] = cells[place];
      const box = cover.getBoundingClientRect();
      show(cellText(grid, row, column),
        box.left + ((column + 0.5) / grid.values[row].length) * box.width,
        box.top + ((row + 0.5) / grid.values.length) * box.height);
    }
    said.textContent = tip.textContent;
  });
}
