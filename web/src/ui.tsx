// Small parts that every page uses.
import type { ComponentChildren, ComponentProps } from 'preact'
import { useEffect, useRef } from 'preact/hooks'

const paths = {
  review: 'M4 5h16v11H4zM9 20h6M12 16v4',
  list: 'M4 6h16M4 12h16M4 18h16',
  upload: 'M12 16V4m0 0L7 9m5-5 5 5M4 17v3h16v-3',
  chart: 'M4 20V10m6 10V4m6 16v-7m4 7H2',
  people: 'M9 11a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7Zm-7 9c0-3.5 3-6 7-6s7 2.5 7 6M16 4.500a3.5 3.5 0 0 1 0 6.500m2.5 3.500c2 .8 3.5 2.7 3.5 5.5',
  settings: 'M4 7h9m5 0h2M4 17h3m5 0h8M15.5 9.500a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5Zm-6 10a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5Z',
  flag: 'M6 21V4h11l-2 4 2 4H6',
  undo: 'M9 7 4 12l5 5M4 12h10a5 5 0 0 1 0 10h-2',
  check: 'm5 12.5 4.5 4.500L19 7.5',
  left: 'm14 6-6 6 6 6',
  right: 'm10 6 6 6-6 6',
  plus: 'M12 5v14M5 12h14',
  minus: 'M5 12h14',
  close: 'm6 6 12 12M18 6 6 18',
  help: 'M9 9.500a3 3 0 1 1 4.5 2.600c-1 .6-1.5 1.1-1.5 2.400M12 18v.01',
  full: 'M4 9V4h5m6 0h5v5m0 6v5h-5m-6 0H4v-5',
  home: 'm4 11 8-7 8 7v9h-5v-6H9v6H4z',
  sun: 'M12 16.500a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9ZM12 2v2m0 16v2M2 12h2m16 0h2M5 5l1.5 1.500m11 11L19 19M5 19l1.5-1.500m11-11L19 5',
  moon: 'M20 14.500A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.500Z',
  auto: 'M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18Zm0 0v18m0-16h4m-4 4h7m-7 4h8m-8 4h6',
  download: 'M12 4v12m0 0 5-5m-5 5-5-5M4 20h16',
  search: 'M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13Zm5-1.500L21 21',
  map: 'M12 21s7-6.5 7-11.500a7 7 0 0 0-14 0C5 14.5 12 21 12 21Zm0-9a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5Z',
  retry: 'M20 11a8 8 0 1 0-2.5 6.500M20 5v6h-6',
  panel: 'M4 5h16v14H4zM10 5v14',
  clock: 'M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18Zm0-14v5l3.5 2',
  exit: 'M10 4H4v16h6M15 8l4 4-4 4m4-4H9',
  contrast: 'M12 3a9 9 0 1 0 0 18V3Z M12 3a9 9 0 0 1 0 18',
} as const
export type IconName = keyof typeof paths

export function Icon({ name, size = 18 }: { name: IconName; size?: number }) {
  return (
    <svg class="icon" width={size} height={size} viewBox="0 0 24 24" aria-hidden="true" fill="none" stroke="currentColor"
      stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round"><path d={paths[name]} /></svg>
  )
}

type ButtonProps = Omit<ComponentProps<'button'>, 'icon' | 'size'> & {
  icon?: IconName; hint?: string; look?: 'plain' | 'main' | 'quiet' | 'danger'; children?: ComponentChildren
}
/** A button; `hint` is its key, shown small and read out as its shortcut. */
export function Button({ icon, hint, look = 'plain', children, class: extra, ...rest }: ButtonProps) {
  return (
    <button type="button" {...rest} class={`button ${look} ${children ? '' : 'only-icon'} ${extra ?? ''}`}
      aria-keyshortcuts={hint}>
      {icon && <Icon name={icon} />}
      {children && <span>{children}</span>}
      {hint && <kbd aria-hidden="true">{hint}</kbd>}
    </button>
  )
}

export function Field({ label, note, children }: { label: string; note?: ComponentChildren; children: ComponentChildren }) {
  return <label class="field"><span class="label">{label}</span>{children}{note && <small>{note}</small>}</label>
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return <div class="empty"><h2>{title}</h2>{children}</div>
}

export function Spinner({ label = 'Loading…' }: { label?: string }) {
  return <div class="spinner" role="status"><span class="dot" /><span>{label}</span></div>
}

/** A modal window on the browser's own <dialog>: focus stays in it, Escape closes it. */
export function Dialog({ title, onClose, children }: { title: string; onClose: () => void; children: ComponentChildren }) {
  const box = useRef<HTMLDialogElement>(null)
  useEffect(() => { box.current?.showModal() }, [])
  return (
    <dialog ref={box} class="dialog" aria-label={title} onClose={onClose}
      onClick={(e) => { if (e.target === box.current) box.current?.close() }}>
      <header><h2>{title}</h2><Button look="quiet" icon="close" aria-label="Close" onClick={() => box.current?.close()} /></header>
      <div class="dialog-body">{children}</div>
    </dialog>
  )
}

export function Chip({ tone = '', children, title }: { tone?: string; children: ComponentChildren; title?: string }) {
  return <span class={`chip ${tone}`} title={title}>{children}</span>
}

const dateForm = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' })
/** A time of the server (UTC) as the reader's clock shows it. */
export function when(at: string | null | undefined): string {
  if (!at) return '–'
  const d = new Date(/[zZ]|[+-]\d\d:?\d\d$/.test(at) ? at : `${at}Z`)
  return Number.isNaN(d.getTime()) ? at : dateForm.format(d)
}

export function bytes(n: number): string {
  if (n < 1000) return `${n} B`
  if (n < 1e6) return `${(n / 1e3).toFixed(0)} kB`
  return n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`
}
