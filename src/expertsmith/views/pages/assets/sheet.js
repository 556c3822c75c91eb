"use strict";
// Light or dark: as the system has it, until the button is used. On paper a page is light by its style.
const root = document.documentElement, preferred = matchMedia("(prefers-color-scheme: dark)");
const theme = (isDark) => root.classList.toggle("dark", isDark);
theme(preferred.matches);
preferred.addEventListener("change", (event) => theme(event.matches));
document.getElementById("theme").addEventListener("click", () => theme(!root.classList.contains("dark")));
