"use strict";
// What cells are shaded by, and the likeliest tokens of the one that is pointed at.

const cells = [...document.querySelectorAll("td[data-cell]")];
const read = new Map(cells.map((cell) => [cell, JSON.parse(cell.dataset.cell)]));
const most = (name) => Math.max(1e-9, ...cells.map((cell) => read.get(cell)[name]));
const share = {
  next: (value) => value.next ?? 0,
  top: (value) => value.top,
  rank: (value) => (value.rank ? 1 / value.rank : 0),
  entropy: (value) => value.entropy / most.entropy,
  kl: (value) => value.kl / most.kl,
};
most.entropy = most("entropy");
most.kl = most("kl");

document.getElementById("shade").addEventListener("change", (event) => {
  for (const cell of cells) {
    const percent = Math.round(100 * share[event.target.value](read.get(cell)));
    cell.style.setProperty("--share", percent);
    cell.classList.toggle("dark", percent > 55);
  }
});

// The answer is what matters: begin a little before it.
for (const table of document.querySelectorAll("table.lens")) {
  const first = table.tHead.rows[0].cells[1 + Number(table.dataset.from)];
  table.parentElement.scrollLeft = first.offsetLeft - table.tHead.rows[0].cells[0].offsetWidth;
}

const panel = document.getElementById("cell");

function element(name, text, width) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (width !== undefined) made.style.width = width;
  return made;
}

function show(cell) {
  const value = read.get(cell);
  const column = cell.cellIndex;
  const table = cell.closest("table");
  const layer = cell.parentElement.querySelector("th").textContent;
  const heading = element("p");
  heading.style.margin = "0 0 0.4rem";
  heading.append(element("b", table.tHead.rows[0].cells[column].textContent), ` → ? · layer ${layer}`);
  const list = element("table");
  for (const [token, p] of value.likely) {
    const row = list.insertRow();
    row.insertCell().textContent = token;
    row.insertCell().textContent = p.toFixed(3);
    row.insertCell().append(element("i", undefined, `${(5 * p).toFixed(2)}rem`));
  }
  const facts = [`entropy ${value.entropy.toFixed(2)}`, `KL ${value.kl.toFixed(2)}`];
  if (value.next !== null) facts.unshift(`what follows: ${value.next.toFixed(3)}, rank ${value.rank}`);
  panel.replaceChildren(heading, list, element("span", facts.join(" · ")));
  panel.hidden = false;
}

for (const type of ["mouseover", "focusin"]) {
  document.addEventListener(type, (event) => {
    const cell = event.target.closest?.("td[data-cell]");
    if (cell) show(cell);
    else panel.hidden = true;
  });
}

document.addEventListener("click", (event) => event.target.closest("td[data-cell]")?.focus());

const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
document.addEventListener("keydown", (event) => {
  const cell = document.activeElement?.closest?.("td[data-cell]");
  if (!cell || !moves[event.key]) return;
  const [down, right] = moves[event.key];
  const row = cell.closest("table").rows[cell.parentElement.rowIndex + down];
  const next = row?.cells[cell.cellIndex + right];
  if (next?.dataset.cell) next.focus();
  event.preventDefault();
});
