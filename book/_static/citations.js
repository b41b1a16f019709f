// The bibliography's list holds no list items by role, which screen readers stumble over: it is no list then.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".citation-list[role=list]").forEach((list) => list.removeAttribute("role"));
});
