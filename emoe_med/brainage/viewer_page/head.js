// The head from outside: a shaded surface of the anatomy, and through it the strongest value of the map along each
// line of sight (of a map of labels the first one). It is computed here, so no graphics card is asked for.

const HEAD_PIXELS = 180;
const STEP_MM = 2.5; // along a line of sight
const SURFACE = 60; // grey of the anatomy at which the brain begins, of 255

class Head {
  constructor(canvas, box) {
    this.canvas = canvas;
    canvas.width = canvas.height = 2.5 * HEAD_PIXELS;
    this.buffer = new OffscreenCanvas(HEAD_PIXELS, HEAD_PIXELS);
    this.centre = box.map(([low, high]) => (low + high) / 2);
    this.radius = Math.hypot(...box.map(([low, high]) => (high - low) / 2)) * 0.8;
    this.turn = -0.6; // about the vertical axis, radians; 0 looks at the face
    this.tilt = 0.3; // upwards
    this.shown = ""; // what the buffer holds
  }

  // Unit vectors of the picture in the world: to its right, upwards, and away from the viewer.
  frame() {
    const [sin, cos] = [Math.sin(this.turn), Math.cos(this.turn)];
    const [rise, level] = [Math.sin(this.tilt), Math.cos(this.tilt)];
    return { right: [-cos, sin, 0], up: [-sin * rise, -cos * rise, level], away: [-sin * level, -cos * level, -rise] };
  }

  // view: as of the slices, and `key`: a text that changes with the map, its colours and opacity
  draw(view) {
    const frame = this.frame();
    const wanted = `${this.turn} ${this.tilt} ${view.key}`;
    if (wanted !== this.shown) this.paint(view, frame); // a moved crosshair alone changes nothing here
    this.shown = wanted;
    const context = this.canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.buffer, 0, 0, this.canvas.width, this.canvas.height);
    this.drawPlaces(context, view, frame);
    if (view.warning) drawWarning(context, view.warning);
  }

  paint(view, { right, up, away }) {
    const image = new ImageData(HEAD_PIXELS, HEAD_PIXELS);
    const size = (2 * this.radius) / HEAD_PIXELS; // mm per pixel
    for (let row = 0; row < HEAD_PIXELS; row++) {
      for (let column = 0; column < HEAD_PIXELS; column++) {
        const a = (column + 0.5 - HEAD_PIXELS / 2) * size;
        const b = (HEAD_PIXELS / 2 - row - 0.5) * size;
        if (a * a + b * b > this.radius * this.radius) continue;
        const start = this.centre.map((c, axis) => c + a * right[axis] + b * up[axis] - this.radius * away[axis]);
        const [grey, colour] = this.look(view, start, away);
        if (!grey) continue;
        const light = view.labels ? (60 + grey) / 255 : 1; // labels lie on the surface and take its shade
        const mixed = [0, 1, 2].map((n) => (colour ? grey + view.opacity * (colour[n] * light - grey) : grey));
        image.data.set([...mixed, 255], 4 * (row * HEAD_PIXELS + column));
      }
    }
    this.buffer.getContext("2d").putImageData(image, 0, 0);
  }

  // Along one line of sight: grey of the surface, and the colour of the map within.
  look({ anatomy, map, colour, labels, threshold }, [x0, y0, z0], away) {
    const [x1, y1, z1] = away;
    const { data, shape: [width, height, depth], origin: [ox, oy, oz], spacing: [sx, sy, sz] } = anatomy;
    let grey = 0, found = 0;
    for (let t = 0; t < 2 * this.radius; t += STEP_MM) {
      const [x, y, z] = [x0 + t * x1, y0 + t * y1, z0 + t * z1];
      const i = Math.round((x - ox) / sx), j = Math.round((y - oy) / sy), k = Math.round((z - oz) / sz);
      if (i < 1 || j < 1 || k < 1 || i >= width - 1 || j >= height - 1 || k >= depth - 1) continue;
      const position = (i * height + j) * depth + k;
      if (data[position] <= SURFACE) continue;
      if (!grey) grey = this.shade(anatomy, position, away, t / (2 * this.radius));
      if (!map) break;
      const value = map.at([x, y, z]);
      if (Math.abs(value) >= threshold && Math.abs(value) > Math.abs(found)) {
        found = value;
        if (labels) break;
      }
    }
    return [grey, found ? colour(found) : null];
  }

  // Brighter where the surface faces the viewer and is near.
  shade({ data, strides }, position, away, depth) {
    let facing = 0, square = 0;
    for (let axis = 0; axis < 3; axis++) {
      const slope = data[position + strides[axis]] - data[position - strides[axis]];
      facing += slope * away[axis];
      square += slope * slope;
    }
    return 40 + 170 * Math.max(0, facing / Math.sqrt(square || 1)) * (1.2 - depth);
  }

  // The place that the slices go through, and the sides of the head.
  drawPlaces(context, view, { right, up, away }) {
    const scale = this.canvas.width / (2 * this.radius);
    const project = (place) => {
      const mm = place.map((value, axis) => value - this.centre[axis]);
      const along = (axis) => mm[0] * axis[0] + mm[1] * axis[1] + mm[2] * axis[2];
      return [this.canvas.width / 2 + scale * along(right), this.canvas.height / 2 - scale * along(up), along(away)];
    };
    const [x, y] = project(view.at);
    for (const [style, line] of [["#000b", 5], ["#fff", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = line;
      context.beginPath();
      context.arc(x, y, 9, 0, 2 * Math.PI);
      context.stroke();
    }
    const ends = { R: [1, 0, 0], L: [-1, 0, 0], A: [0, 1, 0], P: [0, -1, 0], S: [0, 0, 1], I: [0, 0, -1] };
    for (const [letter, direction] of Object.entries(ends)) {
      const [u, v, depth] = project(this.centre.map((value, axis) => value + 0.88 * this.radius * direction[axis]));
      if (depth < this.radius * 0.5) drawText(context, letter, u, v);
    }
  }
}
