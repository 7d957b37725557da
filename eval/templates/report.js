(() => {
  const form = document.getElementById("flip-filter");
  if (!form) return;
  const flips = [...document.querySelectorAll(".flip")];
  const apply = () => {
    const words = form.elements.words.value.trim().toLowerCase();
    let shown = 0;
    for (const flip of flips) {
      const fits = ["list", "category", "direction"].every((key) => !form.elements[key].value || flip.dataset[key] === form.elements[key].value);
      flip.hidden = !(fits && (!words || flip.textContent.toLowerCase().includes(words)));
      if (!flip.hidden) shown += 1;
    }
    form.elements.shown.value = `${shown} of ${flips.length} flips shown`;
  };
  const toggle = document.getElementById("open-all");
  toggle.addEventListener("click", () => {
    const open = toggle.getAttribute("aria-pressed") !== "true";
    for (const flip of flips) flip.open = open && !flip.hidden;
    toggle.setAttribute("aria-pressed", String(open));
    toggle.textContent = open ? "Close all" : "Open all";
  });
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();
