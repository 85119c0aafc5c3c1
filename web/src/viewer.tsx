// Deep zoom on OpenSeadragon: one viewer for all images, a scale bar, brightness and contrast, the model's map.
import { useSignal } from '@preact/signals'
import OpenSeadragon from 'openseadragon'
import { useEffect, useRef } from 'preact/hooks'
import { brightness, contrast, mapOpacity } from './state'
import type { Item } from './types'
import { Button } from './ui'

const TILE = 254
const OVERLAP = 1

/** Whether the server has the picture's file: one that came from an export alone has no state. */
const readable = (item: Item) => Boolean(item.width && item.height && item.status)

const version = (item: Item) => (item.sha256 ? `v=${item.sha256.slice(0, 8)}` : '')

function tileSource(item: Item): OpenSeadragon.TileSourceOptions & { getTileUrl: unknown } {
  const { width, height, id } = item as { width: number; height: number; id: number }
  const maxLevel = Math.ceil(Math.log2(Math.max(width, height)))
  return { width, height, tileSize: TILE, tileOverlap: OVERLAP, minLevel: 0, maxLevel,
    getTileUrl: (level: number, x: number, y: number) => `/api/images/${id}/tiles/${level}/${x}_${y}.jpg?${version(item)}` }
}

// OpenSeadragon adds a style sheet to the page unless it finds one of its own there; a strict Content-Security-Policy
// forbids that, so it finds an element of the name that is no style sheet. Our own sheet has the rule.
function withoutInlineSheet() {
  if (document.querySelector('style[data-openseadragon-mobile-css]')) return
  const stand = document.createElementNS('urn:histokit', 'style')
  stand.setAttribute('data-openseadragon-mobile-css', 'true')
  document.head.append(stand)
}

function newViewer(element: HTMLElement): OpenSeadragon.Viewer {
  withoutInlineSheet()
  return OpenSeadragon({ element, drawer: 'canvas', showNavigationControl: false, animationTime: 0.35, springStiffness: 9,
    visibilityRatio: 0.6, minZoomImageRatio: 0.8, maxZoomPixelRatio: 6, zoomPerScroll: 1.35, zoomPerClick: 1,
    immediateRender: true, imageLoaderLimit: 6, timeout: 60_000, placeholderFillStyle: 'transparent',
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, keyboardNavEnabled: false,
  } as unknown as OpenSeadragon.Options)
}

/** A round length of 1, 2 or 5 · 10ⁿ µm that is 70 to 170 px long on the screen. */
export function scaleBar(umPerScreenPx: number): { px: number; text: string } | null {
  if (!(umPerScreenPx > 0) || !Number.isFinite(umPerScreenPx)) return null
  const aim = umPerScreenPx * 150
  const ten = 10 ** Math.floor(Math.log10(aim))
  const um = [5, 2, 1].map((k) => k * ten).find((v) => v <= aim)!
  const text = um >= 1000 ? `${um / 1000} mm` : um < 1 ? `${Math.round(um * 1000)} nm` : `${um} µm`
  return { px: um / umPerScreenPx, text }
}

interface Props { item: Item; map: boolean; mapMeasure?: string; onMap?: () => void; hasModel: boolean }

export function Viewer({ item, map, mapMeasure, onMap, hasModel }: Props) {
  const frame = useRef<HTMLDivElement>(null)
  const place = useRef<HTMLDivElement>(null)
  const viewer = useRef<OpenSeadragon.Viewer | null>(null)
  const bar = useSignal<{ px: number; text: string } | null>(null)
  const zoom = useSignal(0)
  const trouble = useSignal('')
  const resolution = useRef<number | null>(null)
  const width = useRef(1)
  resolution.current = item.um_per_px
  width.current = item.width ?? 1

  useEffect(() => {
    const v = newViewer(place.current!)
    viewer.current = v
    const measure = () => {
      if (!v.world.getItemCount()) return
      const screenPerImage = v.viewport.getContainerSize().x * v.viewport.getZoom(true) / width.current
      zoom.value = screenPerImage
      bar.value = resolution.current ? scaleBar(resolution.current / screenPerImage) : null
    }
    for (const name of ['open', 'animation', 'resize', 'update-viewport']) v.addHandler(name as 'open', measure)
    v.addHandler('open-failed', () => { trouble.value = 'The picture cannot be shown.' })
    return () => { viewer.current = null; v.destroy() }
  }, [])

  useEffect(() => {
    trouble.value = ''
    if (readable(item)) viewer.current?.open(tileSource(item) as never)
    else { viewer.current?.close(); trouble.value = 'The picture’s file is not in this study; upload it to see it.' }
  }, [item.id, readable(item), item.sha256])

  useEffect(() => {
    const canvas = (viewer.current?.drawer as unknown as { canvas?: HTMLElement })?.canvas
    if (canvas) canvas.style.filter = `brightness(${brightness.value}) contrast(${contrast.value})`
  }, [brightness.value, contrast.value, item.id])

  useEffect(() => {
    const v = viewer.current
    if (!v || !map || !mapMeasure || !readable(item)) return
    const image = document.createElement('img')
    image.src = `/api/images/${item.id}/map.png?measure=${encodeURIComponent(mapMeasure)}&${version(item)}`
    image.alt = ''
    image.className = 'attention'
    image.onerror = () => { trouble.value = 'The model has no map for this measure.' }
    const show = () => v.addOverlay({ element: image, location: new OpenSeadragon.Rect(0, 0, 1, item.height! / item.width!) })
    if (v.isOpen()) show()
    else v.addOnceHandler('open', show)
    return () => { v.removeHandler('open', show as never); v.removeOverlay(image); trouble.value = '' }
  }, [map, mapMeasure, item.id, item.sha256])

  const by = (factor: number) => { viewer.current?.viewport.zoomBy(factor); viewer.current?.viewport.applyConstraints() }
  const whole = () => viewer.current?.viewport.goHome()
  const real = () => { viewer.current?.viewport.zoomTo(viewer.current.viewport.imageToViewportZoom(1)) }
  const fullScreen = () => {
    if (document.fullscreenElement) void document.exitFullscreen()
    else void frame.current?.requestFullscreen?.()
  }
  const tuned = brightness.value !== 1 || contrast.value !== 1

  return (
    <div class="viewer" ref={frame} style={{ '--map-opacity': String(mapOpacity.value) }}>
      <div class="osd" ref={place} role="img" aria-label={`Tissue picture ${item.name}`} />
      {trouble.value && <p class="viewer-note" role="status">{trouble.value}</p>}
      <div class="viewer-tools" role="toolbar" aria-label="View">
        <Button look="quiet" icon="plus" aria-label="Zoom in" title="Zoom in" onClick={() => by(1.5)} />
        <Button look="quiet" icon="minus" aria-label="Zoom out" title="Zoom out" onClick={() => by(1 / 1.5)} />
        <Button look="quiet" icon="home" aria-label="Whole picture" title="Whole picture (0 on the wheel: scroll)" onClick={whole} />
        <button type="button" class="button quiet zoom-read" title="Show at 100 %" aria-label={`Zoom ${Math.round(zoom.value * 100)} percent: show at 100 percent`}
          onClick={real}>{zoom.value ? `${Math.round(zoom.value * 100)} %` : '–'}</button>
        <details class="light">
          <summary class={`button quiet only-icon ${tuned ? 'on' : ''}`} aria-label="Brightness and contrast" title="Brightness and contrast">
            <ContrastIcon />
          </summary>
          <div class="pop">
            <Range label="Brightness" value={brightness} low={0.4} high={1.8} />
            <Range label="Contrast" value={contrast} low={0.4} high={2.2} />
            <Button look="quiet" disabled={!tuned} onClick={() => { brightness.value = 1; contrast.value = 1 }}>Reset</Button>
          </div>
        </details>
        {hasModel && onMap && (
          <>
            <Button look="quiet" icon="map" class={map ? 'on' : ''} aria-pressed={map} aria-label="Where the model looked" hint="g"
              title="Where the model looked (Grad-CAM)" onClick={onMap} />
            {map && <Range label="Map" value={mapOpacity} low={0.05} high={1} />}
          </>
        )}
        <Button look="quiet" icon="full" aria-label="Full screen" title="Full screen" onClick={fullScreen} />
      </div>
      <div class="scale">
        {bar.value
          ? <div class="scale-bar" style={{ width: `${bar.value.px}px` }}><span>{bar.value.text}</span></div>
          : <span class="scale-none">{item.um_per_px ? '' : 'resolution unknown'}</span>}
      </div>
    </div>
  )
}

function ContrastIcon() {
  return (
    <svg class="icon" width="18" height="18" viewBox="0 0 24 24" aria-hidden="true">
      <circle cx="12" cy="12" r="8.5" fill="none" stroke="currentColor" stroke-width="1.8" />
      <path d="M12 3.5a8.5 8.5 0 0 1 0 17z" fill="currentColor" />
    </svg>
  )
}

function Range({ label, value, low, high }: { label: string; value: { value: number }; low: number; high: number }) {
  return (
    <label class="range"><span>{label}</span>
      <input type="range" min={low} max={high} step={0.05} value={value.value} aria-label={label}
        onInput={(e) => { value.value = Number(e.currentTarget.value) }} />
    </label>
  )
}

/** Fetches the first tiles of an image that comes next, so that it stands at once. */
export function warm(item: Item): void {
  if (!readable(item)) return
  const { maxLevel, getTileUrl } = tileSource(item) as { maxLevel: number; getTileUrl: (l: number, x: number, y: number) => string }
  const level = Math.min(maxLevel, 10)
  const shrink = 2 ** (maxLevel - level)
  const [columns, rows] = [item.width!, item.height!].map((n) => Math.ceil(n / shrink / TILE)) as [number, number]
  for (const l of [0, 7, 8, 9]) if (l < level) new Image().src = getTileUrl(l, 0, 0)
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) new Image().src = getTileUrl(level, x, y)
}
