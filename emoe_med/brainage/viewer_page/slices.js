// The three slices through one place: anatomy in grey, the map in colour over it, crosshair, sides marked.
// Left in the picture is left in the head, as the letters say.

const PLANES = {
  axial: { across: 0, up: 1, through: 2, marks: ["L", "R", "A", "P"] },
  coronal: { across: 0, up: 2, through: 1, marks: ["L", "R", "S", "I"] },
  sagittal: { across: 1, up: 2, through: 0, marks: ["P", "A", "S", "I"] },
};
const PIXELS_PER_MM = 3;
const WARNING_PIXELS = 36;

class Slice {
  constructor(canvas, plane, box) {
    Object.assign(this, { canvas, plane, box }); // box: [low, high] of each axis, mm
    canvas.width = (box[plane.across][1] - box[plane.across][0]) * PIXELS_PER_MM;
    canvas.height = (box[plane.up][1] - box[plane.up][0]) * PIXELS_PER_MM;
  }

  // The place in the world of a point of the canvas.
  place(column, row, at) {
    const place = [...at];
    place[this.plane.across] = this.box[this.plane.across][0] + column / PIXELS_PER_MM;
    place[this.plane.up] = this.box[this.plane.up][1] - row / PIXELS_PER_MM;
    return place;
  }

  // The point of the canvas of a place in the world.
  point(place) {
    const { across, up } = this.plane;
    return [(place[across] - this.box[across][0]) * PIXELS_PER_MM, (this.box[up][1] - place[up]) * PIXELS_PER_MM];
  }

  // view: {at, anatomy, map, colour, opacity, smooth, warning}
  draw(view) {
    const context = this.canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    this.paint(context, view.anatomy, view.at, (value) => [value, value, value]);
    if (view.map) {
      context.globalAlpha = view.opacity;
      context.imageSmoothingEnabled = false; // a cell has one value and a sharp edge
      this.paint(context, view.smooth ? this.refined(view.map, view.at) : view.map, view.at, view.colour);
      context.globalAlpha = 1;
    }
    this.drawCrosshair(context, view.at);
    this.drawMarks(context, view.warning ? WARNING_PIXELS : 0);
    if (view.map && view.smooth) drawText(context, "smoothed, display only", this.canvas.width / 2, 52, 20);
    if (view.warning) drawWarning(context, view.warning);
  }

  // Draw the voxels of a volume that the slice goes through; the canvas brings them to size.
  paint(context, volume, at, colour) {
    const { across, up, through } = this.plane;
    const [columns, rows] = [volume.shape[across], volume.shape[up]];
    const layer = volume.index(through, at[through]);
    if (layer < 0) return;
    const image = new ImageData(columns, rows);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const value = volume.data[
          layer * volume.strides[through] + column * volume.strides[across] + row * volume.strides[up]];
        const found = Number.isNaN(value) ? null : colour(value);
        if (found) image.data.set([...found, 255], 4 * ((rows - 1 - row) * columns + column));
      }
    }
    const small = new OffscreenCanvas(columns, rows);
    small.getContext("2d").putImageData(image, 0, 0);
    const corner = [...at];
    corner[across] = volume.origin[across] - volume.spacing[across] / 2;
    corner[up] = volume.origin[up] + volume.spacing[up] * (rows - 0.5);
    const [left, top] = this.point(corner);
    context.drawImage(small, left, top,
      columns * volume.spacing[across] * PIXELS_PER_MM, rows * volume.spacing[up] * PIXELS_PER_MM);
  }

  // The layer of a map that the slice goes through, its values interpolated to 1 mm.
  refined(map, at) {
    const { across, up, through } = this.plane;
    const shape = [1, 1, 1], origin = [...at];
    for (const axis of [across, up]) {
      origin[axis] = Math.ceil(this.box[axis][0]);
      shape[axis] = Math.floor(this.box[axis][1]) - origin[axis];
    }
    const fine = new Volume({ shape, origin, spacing: [1, 1, 1] }, new Float32Array(shape[0] * shape[1] * shape[2]));
    const place = [...at];
    for (let column = 0; column < shape[across]; column++) {
      for (let row = 0; row < shape[up]; row++) {
        place[across] = origin[across] + column;
        place[up] = origin[up] + row;
        fine.data[column * fine.strides[across] + row * fine.strides[up]] = map.between(place);
      }
    }
    return fine;
  }

  drawCrosshair(context, at) {
    const [column, row] = this.point(at);
    const { width, height } = context.canvas;
    const gap = 10; // what the crosshair points at stays visible
    for (const [style, line] of [["#000b", 4], ["#fff", 1.5]]) {
      context.strokeStyle = style;
      context.lineWidth = line;
      context.beginPath();
      for (const [x0, y0, x1, y1] of [
        [0, row, column - gap, row], [column + gap, row, width, row],
        [column, 0, column, row - gap], [column, row + gap, column, height],
      ]) {
        context.moveTo(x0, y0);
        context.lineTo(x1, y1);
      }
      context.stroke();
    }
  }

  drawMarks(context, below) {
    const { width, height: full } = context.canvas;
    const height = full - below;
    const [left, right, top, bottom] = this.plane.marks;
    drawText(context, left, 18, height / 2);
    drawText(context, right, width - 18, height / 2);
    drawText(context, top, width / 2, 18);
    drawText(context, bottom, width / 2, height - 18);
  }
}

function drawText(context, text, x, y, size = 24) {
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineWidth = 5;
  context.strokeStyle = "#000";
  context.strokeText(text, x, y);
  context.fillStyle = "#fff";
  context.fillText(text, x, y);
}

// In the picture itself, so that a copy of the picture carries it too.
function drawWarning(context, text) {
  const { width, height } = context.canvas;
  context.fillStyle = "#b3261ee6";
  context.fillRect(0, height - WARNING_PIXELS, width, WARNING_PIXELS);
  context.font = "700 22px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = "#fff";
  context.fillText(text, width / 2, height - WARNING_PIXELS / 2 + 1, width);
}
